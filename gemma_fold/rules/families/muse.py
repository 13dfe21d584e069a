"""Rows of the Muse families."""

from __future__ import annotations

from gemma_fold.rules.families.common import LANGUAGE_MODEL, SANDWICH, VISION_NORM, ran
from gemma_fold.rules.model import Evidence, Fold, Kind
from gemma_fold.rules.row import Converted, Family, Norm, Part, Plain, Switch, Test, is_true, one_of

_MUSE_FINAL = Plain("norm.weight", "the final norm is plain, unlike the norms of the layers")
_MUSE_VISION = (
    Plain("vision_tower.{ln_pre,ln_post,layers.{i}.norm{1,2}}.weight", VISION_NORM),
    Plain("vision_encoder.{ln_pre,ln_post}.weight", VISION_NORM),
    Plain("vision_encoder.transformer.{,resblocks.}{i}.ln_{1,2}.weight", VISION_NORM),
)
_INPUT_SCALED = (
    "scales the input of its norm by 1 + w, so 1 + w is not the gain of an RMSNorm; left alone"
)
# In vLLM 0.33 draft layers count on from those of the target, which no config of a draft names.
_CENTRES = Switch(
    "post_norm_gain_center_type",
    one_of(one=True, zero=False),
    absent=True,
    refusal="the offset of its post norms depends on the index of each layer, counted from the "
    "first layer of the target model, whose number of layers this config does not say",
)
_LEARNABLE = Switch(
    "use_ffn_learnable_scales",
    Test("is false", lambda value: True if value is False else None),
    absent=True,
    refusal=f"its post_ffn_norm {_INPUT_SCALED.removesuffix('; left alone')}",
)
_DRAFT_READ = "vLLM 0.33 models/muse_spark/"
MUSE = (
    Family(
        model_types=("muse_glimmer_text",),
        norms=(Norm(SANDWICH),),
        plain=(_MUSE_FINAL,),
        evidence=ran("muse_glimmer/modeling_muse_glimmer.py:122"),
    ),
    Family(  # the vendor's layout; its post_attention_layernorm is the norm before the MLP
        model_types=("muse_glimmer_text",),
        norms=(
            Norm(
                "layers.{i}."
                "{input_layernorm,post_attn_norm,post_attention_layernorm,post_ffn_norm}.weight"
            ),
        ),
        plain=(_MUSE_FINAL,),
        evidence=Evidence("read", "vLLM 0.32 models/muse_glimmer.py:1380-1440"),
    ),
    Family(
        model_types=("muse_glimmer",),
        plain=_MUSE_VISION,
        parts=(Part("text_config", LANGUAGE_MODEL, model_type="muse_glimmer_text"),),
        evidence=ran("muse_glimmer/modeling_muse_glimmer.py:122"),
    ),
    Family(
        model_types=("muse_spark_text",),
        norms=(
            Norm("layers.{i}.{input,pre_feedforward}_layernorm.weight"),
            Norm("layers.{i}.mlp.pre_expert_norm.weight", layer_types=("sparse",)),
            Norm(
                "layers.{i}.post_feedforward_layernorm.weight",
                kind=Kind.NOT_A_GAMMA,
                note=_INPUT_SCALED,
            ),
            Norm(
                "layers.{i}.mlp.experts.post_expert_norm.weight",
                layer_types=("sparse",),
                kind=Kind.NOT_A_GAMMA,
                note=_INPUT_SCALED,
            ),
        ),
        fold=Fold(add_dtype="storage"),
        plain=(_MUSE_FINAL,),
        converted=(Converted("layers.{i}.add_{attn,ffn}_{alpha,beta}", "MLX"),),
        evidence=ran("muse_spark/modeling_muse_spark.py:126"),
    ),
    Family(
        model_types=("muse_spark",),
        plain=(
            *_MUSE_VISION,
            Plain(
                "audio_tower.{norm,post_proj_norm,layers.{i}.patch_embedder.norm,"
                "layers.{i}.conv_blocks.{i}.norm}.weight",
                "RMSNorm of the audio tower: its weight is the gain itself",
            ),
        ),
        parts=(Part("text_config", LANGUAGE_MODEL, model_type="muse_spark_text"),),
        evidence=ran("muse_spark/modeling_muse_spark.py:126"),
    ),
    Family(  # draft of Muse Spark; without norm_affine or post_norm_affine it has no such weights
        model_types=("muse_spark_dspark",),
        architectures=("MuseSparkDSparkModel",),
        roots=("",),
        switches=(Switch("norm_zero_centered_gamma", is_true, absent=False), _LEARNABLE),
        norms=(
            Norm(
                "layers.{i}.{self_attn.pre_qkv_proj_norm,pre_ffn_norm}.weight",
                unless_false="norm_affine",
            ),
            Norm("{hidden_norm,norm}.weight", unless_false="norm_affine"),
            Norm(
                "layers.{i}.post_{attn,ffn}_norm.weight",
                unless_false="post_norm_affine",
                switch=_CENTRES,
            ),
        ),
        evidence=Evidence(
            "read",
            _DRAFT_READ + "common/layers.py:19-41,78-87,127-131; common/dspark.py:133-151; "
            "nvidia/model.py:977-980,1045-1053,1306-1311,1342-1395",
        ),
    ),
)
