"""Norms of a few families that no kernel covers, in plain torch, and the fold itself on tensors.

Shapes: activations ``[..., H]``; ``gamma`` fp32 ``[H]``. A family that adds in the storage dtype
applies the gain in that dtype too, so its gamma is rounded to the dtype of the activations first;
for 16-bit weights that rounding gives exactly the sum the family computes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fold(weight: Tensor, offset: float, *, in_storage_dtype: bool) -> Tensor:
    """fp32 ``offset + weight``, added in fp32 or, as some families do, in the weight's dtype."""
    if in_storage_dtype:
        return (weight + offset).float()
    return weight.float() + offset


def unfold(gamma: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype`` whose fold is ``gamma``; exact wherever ``gamma`` came from one."""
    return (gamma - offset).to(dtype)


def grouped_rms_norm(x: Tensor, gamma: Tensor, group_size: int, eps: float) -> Tensor:
    """RMSNorm of every ``group_size`` columns by themselves, then the gain of all H columns."""
    x32 = x.float().unflatten(-1, (-1, group_size))
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * gamma).to(x.dtype)


def layer_norm(x: Tensor, gamma: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm with the gain in the dtype of ``x``. ``bias``: [H] or None."""
    return F.layer_norm(x, gamma.shape, gamma.to(x.dtype), bias, eps)


def layer_norm_then_scale(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """LayerNorm rounded to the dtype of ``x``, then the gain applied in that dtype."""
    return F.layer_norm(x, gamma.shape, None, None, eps) * gamma.to(x.dtype)
