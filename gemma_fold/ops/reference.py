"""The numerics contract in plain torch: what every kernel is tested against, and what CPU runs.

Shapes: activations are ``[..., H]`` in bf16, fp16 or fp32; gammas are ``[H]`` in fp32, already
folded (``gamma = 1 + w``). A norm is ``(x32 * rsqrt(mean(x32^2) + eps) * gamma32)`` rounded once to
the dtype of ``x``; with that order of operations the result is bit-identical to the zero-centred
norm it replaces. Fused operations round where the unfused sequence rounds: the residual stream
always lives in the dtype of ``x``.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite e4m3fn value
# A row of zeros must not divide by zero; engines use this floor for per-token scales.
FP8_MIN_SCALE = 1.0 / (FP8_MAX * 512.0)


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """``x``: [..., H]; ``gamma``: fp32 [H]. Returns [..., H] in the dtype of ``x``."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * gamma).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns ``(rms_norm(s), s)`` with ``s = residual + x`` rounded to the dtype of ``x``."""
    total = residual + x
    return rms_norm(total, gamma, eps), total


def rms_norm_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns ``(rms_norm(s, pre), s)`` with ``s = residual + rms_norm(x, post)``."""
    return add_rms_norm(rms_norm(x, post_gamma, post_eps), residual, pre_gamma, pre_eps)


def qk_rms_norm(q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor, eps: float) -> None:
    """Normalises the last dimension of ``q`` and of ``k`` in place."""
    q.copy_(rms_norm(q, q_gamma, eps))
    k.copy_(rms_norm(k, k_gamma, eps))


def rotate(x: Tensor, cos_sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
    """Rotary embedding of the first ``rotary_dim`` columns of ``x`` [..., heads, head_dim].

    ``cos_sin``: [n, rotary_dim] with ``positions`` [...] int, or [..., rotary_dim] without; cosines
    in the first half of its columns, sines in the second. Products and sum have the dtype torch
    gives them, so an fp32 ``cos_sin`` rounds once, and one in the dtype of ``x`` rounds every step.
    A position outside [0, n) gives NaN.
    """
    if positions is not None:
        held = (positions >= 0) & (positions < cos_sin.shape[0])
        taken = cos_sin[positions.long().clamp(0, cos_sin.shape[0] - 1)]
        cos_sin = taken.masked_fill(~held.unsqueeze(-1), float("nan"))
    cos, sin = cos_sin.unsqueeze(-2).chunk(2, dim=-1)
    rotary_dim = cos_sin.shape[-1]
    turning = x[..., :rotary_dim]
    if interleaved:
        x1, x2 = turning[..., ::2], turning[..., 1::2]
    else:
        x1, x2 = turning.chunk(2, dim=-1)
    turned = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    rotated = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((rotated.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def qk_rms_norm_rope(
    q: Tensor,
    k: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos_sin: Tensor,
    positions: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`rotate` of the norms of ``q`` and ``k``, which round to their dtype before it."""
    return (
        rotate(rms_norm(q, q_gamma, eps), cos_sin, positions, interleaved),
        rotate(rms_norm(k, k_gamma, eps), cos_sin, positions, interleaved),
    )


def rms_norm_backward(grad: Tensor, x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`rms_norm`: ``dx`` [..., H] in the dtype of ``x``, ``dgamma`` fp32 [H]."""
    x32, grad32 = x.float(), grad.float()
    rstd = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    x_hat, scaled = x32 * rstd, grad32 * gamma
    dx = rstd * (scaled - x_hat * (scaled * x_hat).mean(-1, keepdim=True))
    dgamma = (grad32 * x_hat).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dgamma


def quantize(y: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """e4m3 of ``y / scale``, saturating; NaN stays NaN. Returns it and the fp32 scale(s).

    ``scale`` holds one fp32 element; ``None`` takes one scale per row, [..., 1], from its largest
    magnitude.
    """
    y32 = y.float()
    if scale is None:
        scale = (y32.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=FP8_MIN_SCALE)
    return (y32 * scale.reciprocal()).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale
