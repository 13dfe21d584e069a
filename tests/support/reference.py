"""The operators in plain torch, by name: what the kernels' tests compare with."""

from __future__ import annotations

from torch import Tensor

from gemma_fold.ops.operators.add_rms_norm import reference as add_rms_norm
from gemma_fold.ops.operators.base import quantize
from gemma_fold.ops.operators.qk_rms_norm import reference as _qk_rms_norm
from gemma_fold.ops.operators.qk_rms_norm_rope import reference as qk_rms_norm_rope
from gemma_fold.ops.operators.qk_rms_norm_rope import rotate
from gemma_fold.ops.operators.rms_norm import reference as rms_norm
from gemma_fold.ops.operators.rms_norm import reference_backward as rms_norm_backward
from gemma_fold.ops.operators.rms_norm_add_rms_norm import reference as rms_norm_add_rms_norm

__all__ = [
    "add_rms_norm",
    "qk_rms_norm",
    "qk_rms_norm_rope",
    "quantize",
    "rms_norm",
    "rms_norm_add_rms_norm",
    "rms_norm_backward",
    "rotate",
]


def qk_rms_norm(q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor, eps: float) -> None:
    """Normalises the last dimension of ``q`` and of ``k`` in place."""
    for heads, normed in zip((q, k), _qk_rms_norm(q, k, q_gamma, k_gamma, eps), strict=True):
        heads.copy_(normed)
