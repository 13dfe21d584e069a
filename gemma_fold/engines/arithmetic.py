"""Norms of a few families that no kernel covers, in plain torch, and the fold itself on tensors.

Shapes: activations ``[..., H]``; ``gamma`` fp32 ``[H]``. A family that adds in the storage dtype
has a gain of that dtype, so gamma is rounded to the dtype of the activations before it is used. The
rounded fp32 sum is the sum in that dtype: torch, too, adds a scalar in fp32 and rounds once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fold(weight: Tensor, offset: float) -> Tensor:
    """fp32 ``offset + weight``."""
    return weight.float() + offset


def unfold(gamma: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype`` whose fold is ``gamma``; exact wherever ``gamma`` came from one."""
    return (gamma - offset).to(dtype)


def grouped_rms_norm(x: Tensor, gamma: Tensor, group_size: int, eps: float) -> Tensor:
    """RMSNorm of every ``group_size`` columns by themselves, then the gain of all H columns."""
    x32 = x.float().reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    normed: Tensor = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * gamma).to(x.dtype)


def layer_norm(x: Tensor, gamma: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm with the gain in the dtype of ``x``. ``bias``: [H] or None."""
    return F.layer_norm(x, gamma.shape, gamma.to(x.dtype), bias, eps)


def layer_norm_then_scale(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """LayerNorm rounded to the dtype of ``x``, then the gain applied in that dtype."""
    return F.layer_norm(x, gamma.shape, None, None, eps) * gamma.to(x.dtype)
