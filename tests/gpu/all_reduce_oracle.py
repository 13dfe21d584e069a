"""What the fused all-reduce must give, bit for bit, in plain torch on the same GPU.

Ranks are added in rank order in fp32. A row's squares are added in the order that the kernel
documents: each thread its own elements, then the lanes of a warp, then the warps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rank_ordered_sum import rank_ordered_sum
from torch import Tensor

from gemma_fold.ops.collectives import tuning


def _butterfly(values: Tensor) -> Tensor:
    lanes = torch.arange(32, device=values.device)
    for step in (16, 8, 4, 2, 1):
        values = values + values[..., lanes ^ step]
    return values


def norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """``x``: [T, H] bf16, fp16 or fp32; the norm in the dtype of ``x``, in the kernel's order."""
    tokens, hidden = x.shape
    shape = tuning.shape(hidden * x.element_size())
    per_vector = tuning.VECTOR_BYTES // x.element_size()
    x32 = x.float()
    padded = x32.new_zeros(tokens, shape.vectors * shape.threads * per_vector)
    padded[:, :hidden] = x32
    pieces = padded.view(tokens, shape.vectors, shape.threads, per_vector)
    squares = padded.new_zeros(tokens, shape.threads)
    for vector in range(shape.vectors):
        for element in range(per_vector):
            piece = pieces[:, vector, :, element]
            squares = squares + piece * piece
    by_warp = _butterfly(squares.view(tokens, -1, 32))[..., 0]
    lanes = by_warp.new_zeros(tokens, 32)
    lanes[:, : by_warp.shape[1]] = by_warp
    total = _butterfly(lanes)[:, :1]
    # A tensor, because torch multiplies by the reciprocal of a Python number.
    mean = total / torch.full_like(total, float(hidden)) + eps
    if x.dtype == torch.float32:
        rstd = torch.full_like(mean, 1.0) / torch.sqrt(mean)
    else:
        rstd = torch.rsqrt(mean)
    return (x32 * rstd * gamma).to(x.dtype)


def add_norm(
    parts: Sequence[Tensor], residual: Tensor, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = (residual.float() + rank_ordered_sum(parts).float()).to(residual.dtype)
    return norm(total, gamma, eps), total


def norm_add_norm(
    parts: Sequence[Tensor],
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
) -> tuple[Tensor, Tensor]:
    normed = norm(rank_ordered_sum(parts), post_gamma, post_eps)
    total = (residual.float() + normed.float()).to(residual.dtype)
    return norm(total, pre_gamma, pre_eps), total
