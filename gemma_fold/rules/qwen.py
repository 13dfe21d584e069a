"""Rows of the Qwen families with zero-centred norms, and of the models built on them."""

from __future__ import annotations

from gemma_fold.rules.gemma import PRE_NORMS, QK_NORMS, TEXT_ROOTS
from gemma_fold.rules.model import Evidence
from gemma_fold.rules.row import Family, Norm, Part, Plain

_MTP_ROOT = "{,model.,language_model.,language_model.model.,model.language_model.}"
_MTP_READ = Evidence("read", "vLLM 0.32 qwen3_next_mtp.py:107-113, qwen3_5_mtp.py:135-141")
_FULL = ("full_attention",)

GATED_WHY = (
    "gated RMSNorm of linear attention: its weight is the gain itself, "
    "unlike every other text norm here"
)
LINEAR_ATTN = Plain("layers.{i}.linear_attn.norm.weight", GATED_WHY)


def _ran(source: str) -> Evidence:
    return Evidence("executed", f"transformers 5.23 models/{source}")


def _mtp(names: str) -> Norm:
    """Draft tensors in the same files; transformers drops them, engines load them."""
    return Norm(_MTP_ROOT + names, optional=True, absolute=True, evidence=_MTP_READ)


TEXT_NORMS = (
    Norm(PRE_NORMS),
    Norm(QK_NORMS, layer_types=_FULL),
    Norm("norm.weight"),
    _mtp("mtp.{norm,pre_fc_norm_embedding,pre_fc_norm_hidden}.weight"),
    _mtp("mtp." + PRE_NORMS),
    _mtp("mtp." + QK_NORMS),
)
VISUAL = (
    Plain("visual.blocks.{i}.norm{1,2}.weight", "LayerNorm of the vision tower"),
    Plain(
        "visual.{merger,deepstack_merger_list.{i}}.norm.weight",
        "LayerNorm of the vision merger, though the name ends like a text norm",
    ),
)
_VLM_PREFIXES = ("model.language_model.", "language_model.", "model.", "")

QWEN = (
    Family(
        model_types=("qwen3_next",),
        roots=TEXT_ROOTS,
        norms=TEXT_NORMS,
        plain=(LINEAR_ATTN,),
        evidence=_ran("qwen3_next/modeling_qwen3_next.py:126"),
    ),
    Family(
        model_types=("qwen3_5_text",),
        roots=TEXT_ROOTS,
        norms=TEXT_NORMS,
        plain=(LINEAR_ATTN,),
        evidence=_ran("qwen3_5/modeling_qwen3_5.py:833"),
    ),
    Family(
        model_types=("qwen3_5_moe_text",),
        roots=TEXT_ROOTS,
        norms=TEXT_NORMS,
        plain=(LINEAR_ATTN,),
        evidence=_ran("qwen3_5_moe/modeling_qwen3_5_moe.py:913"),
    ),
    Family(
        model_types=("qwen3_5",),
        roots=("model.", ""),
        plain=VISUAL,
        parts=(Part("text_config", _VLM_PREFIXES, default="qwen3_5_text"),),
        evidence=_ran("qwen3_5/modeling_qwen3_5.py:833"),
    ),
    Family(
        model_types=("qwen3_5_moe",),
        roots=("model.", ""),
        plain=VISUAL,
        parts=(Part("text_config", _VLM_PREFIXES, default="qwen3_5_moe_text"),),
        evidence=_ran("qwen3_5_moe/modeling_qwen3_5_moe.py:913"),
    ),
)
