"""Rows of the Qwen families with zero-centred norms, and of the models built on them."""

from __future__ import annotations

from gemma_fold.rules.families.common import LANGUAGE_MODEL, PRE_NORMS, QK_NORMS, TEXT_ROOTS, ran
from gemma_fold.rules.model import Evidence, Fold, Kind
from gemma_fold.rules.row import Converted, Family, Norm, Part, Plain

_FULL = ("full_attention",)
_MTP_ROOT = "{,model.,language_model.,language_model.model.,model.language_model.{,model.}}"
_MTP_READ = Evidence("read", "vLLM 0.32 models/qwen3_next_mtp.py:107-113, qwen3_5_mtp.py:135-141")
_MTP4_READ = Evidence("read", "vLLM 0.32 models/qwen4_exp/nvidia/mtp.py:97-123")


def _mtp(names: str, evidence: Evidence = _MTP_READ, fold: Fold | None = None) -> Norm:
    """Draft tensors in the same files; transformers drops them, engines load them."""
    return Norm(
        _MTP_ROOT + "mtp." + names, fold=fold, optional=True, absolute=True, evidence=evidence
    )


_NORMS = (
    Norm(PRE_NORMS),
    Norm(QK_NORMS, layer_types=_FULL),
    Norm("norm.weight"),
    _mtp("{norm,pre_fc_norm_embedding,pre_fc_norm_hidden}.weight"),
    _mtp(PRE_NORMS),
    _mtp(QK_NORMS),
)
_LINEAR_ATTENTION = Plain(
    "layers.{i}.linear_attn.norm.weight",
    "gated RMSNorm of linear attention: its weight is the gain itself, "
    "unlike every other text norm here",
)
_VISUAL = (
    Plain("visual.blocks.{i}.norm{1,2}.weight", "LayerNorm of the vision tower"),
    Plain(
        "visual.merger.norm.weight",
        "LayerNorm of the vision merger, though the name ends like a text norm",
    ),
)
# MLX moves the channels of a convolution last, and adds 1 to the norms in the same step.
_MLX = (
    Converted("layers.{i}.linear_attn.conv1d.weight", "MLX", last_dim=1),
    Converted("layers.{i}.mlp.switch_mlp.{up,down,gate}_proj.weight", "MLX"),
)
_GROUPED = Fold(norm="grouped_rms_norm")
_INDEXED = ("full_attention", "indexed_attention")
_HYPER = "layers.{i}.{attn,mlp}_hyper_connection.hc_norm.weight"
_MIXER = "hyper_connection_mixer.hc_norm.weight"
_INDEXER = "layers.{i}.self_attn.indexer.{q,k}_layernorm.weight"


def _text(model_type: str, evidence: Evidence) -> Family:
    return Family(
        model_types=(model_type,),
        roots=TEXT_ROOTS,
        norms=_NORMS,
        plain=(_LINEAR_ATTENTION,),
        converted=_MLX,
        evidence=evidence,
    )


def _vision_language(model_type: str, text: str, evidence: Evidence) -> Family:
    return Family(
        model_types=(model_type,),
        plain=_VISUAL,
        parts=(Part("text_config", LANGUAGE_MODEL, model_type=text),),
        evidence=evidence,
    )


QWEN = (
    _text("qwen3_next", ran("qwen3_next/modeling_qwen3_next.py:126")),
    _text("qwen3_5_text", ran("qwen3_5/modeling_qwen3_5.py:833")),
    _text("qwen3_5_moe_text", ran("qwen3_5_moe/modeling_qwen3_5_moe.py:913")),
    _vision_language("qwen3_5", "qwen3_5_text", ran("qwen3_5/modeling_qwen3_5.py:833")),
    _vision_language(
        "qwen3_5_moe", "qwen3_5_moe_text", ran("qwen3_5_moe/modeling_qwen3_5_moe.py:913")
    ),
    Family(  # a bare Qwen 3.5 with a head in a file of its own
        model_types=(),
        architectures=("ClefFlashForJointSchema", "ColQwen3_5", "D3ForSequenceClassification"),
        roots=("",),
        plain=(
            *(Plain("{,model.}" + trap.names, trap.why) for trap in _VISUAL),
            Plain(
                "{hidden_norm,option_summary_norm,field_norm,option_norm,"
                "evidence_layers.{i}.{query,memory,feedforward}_norm,layers.{i}.norm{1,2,3}}"
                ".weight",
                "LayerNorm of the joint schema head",
            ),
        ),
        parts=(Part("text_config", LANGUAGE_MODEL, model_type="qwen3_5_text"),),
        evidence=Evidence(
            "read",
            "vLLM 0.33 models/clef_flash.py:24-44, clef_joint_schema.py:72-137, "
            "colqwen3_5.py:112-146, d3.py:5-8,52-63",
        ),
    ),
    Family(  # grouped: each slice of hidden_size columns is normalized on its own
        model_types=("qwen4_exp_text",),
        roots=TEXT_ROOTS,
        norms=(
            Norm(QK_NORMS, layer_types=_INDEXED),
            Norm(_INDEXER, layer_types=_INDEXED),
            Norm(_HYPER, fold=_GROUPED),
            Norm(_MIXER, fold=_GROUPED),
            Norm("layers.{i}.ple.norm_{key,query,conv}.weight", fold=_GROUPED, optional=True),
            _mtp("pre_fc_norm_embedding.weight", _MTP4_READ),
            _mtp("pre_fc_norm_hidden.weight", _MTP4_READ),
            _mtp(QK_NORMS, _MTP4_READ),
            _mtp(_INDEXER, _MTP4_READ),
            _mtp(_HYPER, _MTP4_READ, _GROUPED),
            _mtp(_MIXER, _MTP4_READ, _GROUPED),
        ),
        plain=(_LINEAR_ATTENTION,),
        evidence=ran("qwen4_exp/modeling_qwen4_exp.py:141"),
    ),
    _vision_language("qwen4_exp", "qwen4_exp_text", ran("qwen4_exp/modeling_qwen4_exp.py:141")),
    Family(
        model_types=("jev",),
        roots=("",),
        parts=(Part("text_config", ("",), default="qwen3_5_text"),),
        evidence=ran("jev/modeling_jev.py, text by its own model_type"),
    ),
    Family(
        model_types=("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
        plain=(
            Plain(
                "{vision_tower,vpm}.{encoder.layers.{i}.layer_norm{1,2},post_layernorm}.weight",
                "LayerNorm of the vision tower",
            ),
            Plain(
                "{,vision_tower.}vit_merger.{layer_norm1,pre_norm}.weight",
                "LayerNorm of the vision merger",
            ),
            Plain("merger.mlp.{i}.pre_norm.weight", "LayerNorm of the vision merger"),
        ),
        parts=(Part("text_config", (*LANGUAGE_MODEL, "{,model.}llm."), default="qwen3_5_text"),),
        evidence=ran("minicpmv4_6/modeling_minicpmv4_6.py, text by its own model_type"),
    ),
    Family(
        model_types=("interns2_mobius_text",),
        roots=TEXT_ROOTS,
        norms=_NORMS,
        plain=(_LINEAR_ATTENTION,),
        converted=_MLX,
        evidence=Evidence("read", "vLLM 0.32 models/interns2_mobius.py:218-332"),
    ),
    Family(
        model_types=("interns2_mobius",),
        plain=_VISUAL,
        parts=(Part("text_config", LANGUAGE_MODEL, model_type="interns2_mobius_text"),),
        evidence=Evidence("read", "SGLang 0.5.23 models/interns2_mobius.py:487-734"),
    ),
    Family(
        model_types=("intern_s2_preview",),
        plain=(
            *_VISUAL,
            Plain("time_series.**", "no engine loads the time-series tower", Kind.OTHER),
        ),
        parts=(Part("text_config", LANGUAGE_MODEL, model_type="qwen3_5_moe_text"),),
        evidence=Evidence("read", "vLLM 0.32 models/interns2_preview.py:34-42"),
    ),
)
