"""Rows of the families whose zero-centred norms are LayerNorms."""

from __future__ import annotations

from gemma_fold.rules.families.common import PRE_NORMS, TEXT_ROOTS, ran
from gemma_fold.rules.model import Fold
from gemma_fold.rules.row import Family, Norm, Part, Plain

_LAYERNORM_1P = Fold(norm="layer_norm", add_dtype="storage")
_BEFORE_AFTER = "_layers.{i}.layernorm_{before,after}.weight"


def _videoprism_vision(inner: str) -> Family:
    """Two layouts: the vision model alone, or inside a video model or classifier."""
    return Family(
        model_types=("videoprism_vision_model",),
        roots=("",),
        norms=(
            Norm(inner + "layernorm{1,2}.weight"),
            Norm(inner + "spatial" + _BEFORE_AFTER, layers="num_spatial_layers"),
            Norm(inner + "temporal" + _BEFORE_AFTER, layers="num_temporal_layers"),
            Norm("auxiliary" + _BEFORE_AFTER, layers="num_auxiliary_layers", optional=True),
            Norm("head_layernorm.weight", optional=True),
        ),
        fold=_LAYERNORM_1P,
        evidence=ran("videoprism/modeling_videoprism.py:408"),
    )


LAYERNORM = (
    Family(  # LayerNorm1P: the bias beside each weight is no part of the gain and stays
        model_types=("nemotron",),
        roots=TEXT_ROOTS,
        norms=(Norm(PRE_NORMS), Norm("norm.weight")),
        fold=_LAYERNORM_1P,
        evidence=ran("nemotron/modeling_nemotron.py:61"),
    ),
    _videoprism_vision("vision_model."),
    _videoprism_vision(""),
    Family(
        model_types=("videoprism_text_model",),
        roots=("",),
        norms=(
            Norm("layers.{i}.layernorm_{before,after}.weight"),
            Norm("layernorm.weight"),
        ),
        fold=_LAYERNORM_1P,
        evidence=ran("videoprism/modeling_videoprism.py:408"),
    ),
    Family(
        model_types=("videoprism",),
        roots=("",),
        parts=(
            Part("vision_config", ("video_model.",), model_type="videoprism_vision_model"),
            Part("text_config", ("text_model.",), model_type="videoprism_text_model"),
        ),
        evidence=ran("videoprism/modeling_videoprism.py:408"),
    ),
    Family(  # the parameter is named gamma and starts at one, and yet 1 is added to it
        model_types=("moonshine_streaming",),
        norms=(
            Norm(
                "encoder.layers.{i}.{input,post_attention}_layernorm.gamma",
                layers="encoder_config.num_hidden_layers",
            ),
            Norm("encoder.final_norm.gamma"),
        ),
        fold=Fold(norm="layer_norm", add_dtype="storage", mul_dtype="storage"),
        plain=(
            Plain(
                "decoder.{norm,layers.{i}.{input,post_attention,final}_layernorm}.weight",
                "LayerNorm of the decoder: its weight is the gain itself, "
                "though the encoder uses the same names",
            ),
        ),
        evidence=ran("moonshine_streaming/modeling_moonshine_streaming.py:120"),
    ),
)
