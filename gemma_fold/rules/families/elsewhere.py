"""Rows of the families that transformers does not run: read in the engines that do."""

from __future__ import annotations

from gemma_fold.rules.families.common import PRE_NORMS, QK_NORMS, SANDWICH
from gemma_fold.rules.model import Evidence, Fold, Kind
from gemma_fold.rules.row import (
    Family,
    Norm,
    Part,
    Plain,
    Switch,
    is_positive,
    is_true,
    mentions,
    one_of,
)

# x_hat is rounded first, then (offset + w) is formed and multiplied in the weights' dtype.
_PLAMO_READ = Evidence(
    "read", "vLLM 0.32 models/plamo3.py:79-83,255-270; the RMSNorm of the first mlx-lm plamo2.py"
)


def _plamo(offset: float) -> Fold:
    return Fold(offset=offset, add_dtype="storage", mul_dtype="storage")


_PLAMO_NORMS = (
    Norm("layers.layers.{i}.{pre_mixer_norm,pre_mlp_norm}.weight"),
    Norm("layers.layers.{i}.post_mixer_norm.weight", fold=_plamo(1 / 5)),
    Norm("layers.layers.{i}.post_mlp_norm.weight", fold=_plamo(1 / 5**1.5)),
    Norm("norm.weight"),
)
_PLAMO_MAMBA = Plain(
    "layers.layers.{i}.mixer.{dt,B,C}_norm_weight", "plain RMSNorm inside the Mamba mixer"
)

_GEAR_ATTENTION = ("full_attention", "sliding_attention")

_TTS = "tts_model.tts_model."

ELSEWHERE = (
    Family(
        model_types=("plamo2",),
        norms=_PLAMO_NORMS,
        fold=_plamo(1.0),
        plain=(_PLAMO_MAMBA,),
        evidence=_PLAMO_READ,
    ),
    Family(
        model_types=("plamo3",),
        norms=(*_PLAMO_NORMS, Norm("layers.layers.{i}.mixer.{q,k}_norm.weight")),
        fold=_plamo(1.0),
        evidence=_PLAMO_READ,
    ),
    Family(
        model_types=("plamo2vl",),
        roots=("model.", "language_model.model."),
        norms=(
            *_PLAMO_NORMS,
            Norm("{,model.}image_proj.norm0.weight", absolute=True, optional=True),
        ),
        fold=_plamo(1.0),
        plain=(_PLAMO_MAMBA,),
        parts=(
            Part("vision_config", ("{,model.}vision_model.",), model_type="siglip_vision_model"),
        ),
        evidence=Evidence("read", "mlx-vlm 0.7.10 models/plamo2vl/language.py:304-314,400"),
    ),
    Family(
        model_types=("gigachat3_5",),
        draft_layers="num_nextn_predict_layers",
        switches=(
            Switch(
                "norm_type",
                one_of(
                    ZeroCenteredRMSNorm=True,
                    ZeroCenteredGatedNorm=True,
                    LlamaRMSNorm=False,
                    GatedNorm=False,
                ),
                absent=True,
            ),
        ),
        norms=(
            Norm(PRE_NORMS),
            Norm(
                "layers.{i}.{post_self_attn,post_feedforward}_layernorm.weight",
                optional=True,  # by layernorm_type
            ),
            Norm(
                "layers.{i}.self_attn.kv_a_layernorm.weight",
                layer_types=("attention", "full_attention"),
            ),
            Norm("layers.{i}.self_attn.q_a_layernorm.weight", optional=True),
            Norm(
                "layers.{i}.linear_attn.norm.weight",
                layer_types=("linear_attention",),
                switch=Switch("linear_gating_type", mentions("zero_centered"), absent=False),
                evidence=Evidence("read", "SGLang 0.5.23 models/gigachat35.py:211-229"),
                note="zero-centred only if linear_gating_type says so; in Qwen it never is",
            ),
            Norm("norm.weight"),
            Norm(
                "layers.{i}.{enorm,hnorm,shared_head.norm}.weight",
                optional=True,
                evidence=Evidence("read", "SGLang 0.5.23 models/gigachat35_mtp.py:62-79"),
            ),
        ),
        evidence=Evidence("read", "SGLang 0.5.23 models/gigachat35.py:73-129,278-281,415-422,562"),
    ),
    Family(  # MoVA; an xLLM without value experts stores plain gamma, and so does K2 Horizon
        model_types=("xllm",),
        switches=(
            Switch("num_values", is_positive, absent=False),
            Switch("_sglang_xllm_checkpoint_format", one_of(k2_horizon_hf=False), absent=True),
        ),
        norms=(Norm(PRE_NORMS), Norm("norm.weight")),
        fold=Fold(norm="grouped_rms_norm", add_dtype="storage"),
        evidence=Evidence("read", "SGLang 0.5.23 models/xllm.py:96-139,546-559"),
    ),
    Family(
        model_types=(),
        architectures=(
            "DFlashDraftModel",
            "DFlash2DraftModel",
            "DFlash2BeamDraftModel",
            "MiniMaxDFlash2DraftModel",
            "DFlashLagunaForCausalLM",
            "DSparkDraftModel",
            "Lfm2DSparkDraftModel",
            "LiLiCorrDraftModel",
            "LingDSparkModel",
            "Qwen3DSparkModel",
        ),
        roots=("", "model."),
        switches=(Switch("use_gemma_norm", is_true, absent=False),),
        norms=(
            Norm(PRE_NORMS),
            Norm(QK_NORMS),
            Norm("norm.weight"),
            Norm("{hidden_norm,encoder.output_norm_enc}.weight", optional=True),
        ),
        evidence=Evidence(
            "read", "SGLang 0.5.23 models/dflash.py:247-250,610-619,695,775,1057, dspark.py:967-981"
        ),
    ),
    Family(  # its full attention is that of Qwen3-Next
        model_types=("alice_ai",),
        architectures=("AliceAIForCausalLM",),
        norms=(
            Norm(PRE_NORMS),
            Norm(QK_NORMS, layer_types=("full_attention",)),
            Norm("norm.weight"),
        ),
        plain=(
            Plain(
                "layers.{i}.linear_attn.o_norm.weight",
                "gated RMSNorm of linear attention: its weight is the gain itself",
            ),
            Plain(
                "{layers.{i}.{attn,mlp}_res_norm_weight,attnres_final.res_norm_weight}",
                "norm over the residuals of earlier blocks: its weight is the gain itself",
            ),
            Plain("mtp.**", "no engine loads the draft layers", Kind.OTHER, absolute=True),
        ),
        evidence=Evidence(
            "read",
            "vLLM 0.33 models/alice_ai.py:161-182,335-377,506,582; models/qwen3_next.py:370-371; "
            "layers/mamba/gdn/kimi_gdn_linear_attn.py:304",
        ),
    ),
    Family(  # its layers of other types are convolutions, without q and k
        model_types=("gear",),
        norms=(
            Norm(SANDWICH),
            Norm(QK_NORMS, layer_types=_GEAR_ATTENTION),
            Norm("norm.weight"),
        ),
        fold=Fold(add_dtype="storage"),
        evidence=Evidence("read", "mlx-lm 0.32.2 models/gear.py:58-66,154-155,344-351,389"),
    ),
    Family(
        model_types=("nemotron_voicechat",),
        roots=("",),
        layers="tts_config.num_hidden_layers",
        norms=(
            Norm(_TTS + "backbone." + SANDWICH),
            Norm(_TTS + "backbone." + QK_NORMS),
            Norm(_TTS + "backbone.norm.weight"),
            Norm(
                _TTS + "embed_subword.backbone.encoder.layers.{i}."
                "{pre,post}_{self_attn,feedforward}_layernorm.weight",
                layers="tts_config.character_encoder.num_hidden_layers",
            ),
            Norm(_TTS + "embed_subword.backbone.encoder.norm.weight"),
            Norm(_TTS + "gated_fusion_audio_text.final_norm.weight"),
            Norm(
                _TTS + "mog_head.mlp_stack.{i}.{pre,post}_norm.weight",
                layers="tts_config.mog_head.num_layers",
            ),
            Norm(_TTS + "mog_head.mlp_stack.{i}.weight", optional=True),
        ),
        plain=(
            Plain("stt_model.**", "the language model (Nemotron-H) and perception are plain"),
            Plain("tts_model.audio_codec.**", "the audio codec is plain"),
        ),
        evidence=Evidence("read", "mlx-vlm 0.7.10 models/nemotron_voicechat/tts.py:26-38,197-377"),
    ),
)
