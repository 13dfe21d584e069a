"""Rows of the MiniMax M3 family."""

from __future__ import annotations

from gemma_fold.rules.families.common import LANGUAGE_MODEL, PRE_NORMS, QK_NORMS, VISION_NORM, ran
from gemma_fold.rules.model import Evidence
from gemma_fold.rules.row import Family, Norm, Part, Plain, Switch, is_true

# transformers and vLLM always add 1, SGLang and mlx-lm only if asked to.
_USE_GEMMA_NORM = Switch("use_gemma_norm", is_true, absent=True)
_M3_MTP = Evidence("read", "vLLM 0.32 models/minimax_m3/nvidia/mtp.py:49-67,195-223")
_M3_DSPARK = Evidence("read", "SGLang 0.5.23 models/dspark_minimax.py:112-128,277")
_M3_ROOT = "{,language_model.}{,model.}"


def _m3_draft(names: str, evidence: Evidence) -> Norm:
    return Norm(_M3_ROOT + names, optional=True, absolute=True, evidence=evidence)


_M3_DRAFTS = (
    _m3_draft("mtp.layers.{i}.{enorm,hnorm,final_layernorm}.weight", _M3_MTP),
    _m3_draft("mtp.layers.{i}.transformer_layer.{input,post_attention}_layernorm.weight", _M3_MTP),
    _m3_draft(
        "mtp.layers.{i}.transformer_layer.self_attn.{,index_,indexer.}{q,k}_norm.weight", _M3_MTP
    ),
    _m3_draft("dspark.{norm,final_norm,hidden_norm}.weight", _M3_DSPARK),
    _m3_draft(
        "dspark.layers.{i}.decoder_layer.{input,post_attention}_layernorm.weight", _M3_DSPARK
    ),
    _m3_draft("dspark.layers.{i}.decoder_layer.self_attn.{q,k}_norm.weight", _M3_DSPARK),
)


def _minimax_m3(indexer: str) -> Family:
    """Two layouts, which spell the indexer's norms differently."""
    return Family(
        model_types=("minimax_m3_vl_text", "minimax_m3_text"),
        norms=(
            Norm(PRE_NORMS),
            Norm(QK_NORMS),
            Norm(indexer, layer_types=("minimax_m3_sparse",)),
            Norm("norm.weight"),
            *_M3_DRAFTS,
        ),
        switches=(_USE_GEMMA_NORM,),
        evidence=ran("minimax_m3_vl/modeling_minimax_m3_vl.py:140"),
    )


MINIMAX = (
    _minimax_m3("layers.{i}.self_attn.index_{q,k}_norm.weight"),
    _minimax_m3("layers.{i}.self_attn.indexer.{q,k}_norm.weight"),
    Family(
        model_types=("minimax_m3_vl",),
        plain=(
            Plain("vision_tower.{,vision_model.}pre_layrnorm.weight", VISION_NORM),
            Plain(
                "vision_tower.{,vision_model.encoder.}layers.{i}.layer_norm{1,2}.weight",
                VISION_NORM,
            ),
        ),
        parts=(Part("text_config", LANGUAGE_MODEL, model_type="minimax_m3_vl_text"),),
        evidence=ran("minimax_m3_vl/modeling_minimax_m3_vl.py:140"),
    ),
    Family(
        model_types=("minimax_m3_mtp",),
        norms=_M3_DRAFTS,
        switches=(_USE_GEMMA_NORM,),
        evidence=_M3_MTP,
    ),
)
