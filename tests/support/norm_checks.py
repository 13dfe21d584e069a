"""What the kernel tests share: inputs, units in the last place, and float64 oracles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gemma_fold import ops

Write = Callable[[Tensor, Tensor], None]
MANTISSA = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


def rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str) -> Tensor:
    """Activations as a residual stream has them: rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= torch.exp(torch.randn((*shape[:-1], 1), generator=generator))
    return x.to(device, dtype)


def gamma(hidden: int, seed: int, device: str) -> Tensor:
    """Gains as real Gemma norms have them: mostly around 4, some near zero and negative."""
    generator = torch.Generator().manual_seed(seed)
    return (1.0 + 3.0 * torch.randn(hidden, generator=generator)).to(device)


def ulps(got: Tensor, want: Tensor, dtype: torch.dtype, *magnitudes: Tensor) -> float:
    """Largest difference in units in the last place of ``dtype``.

    The unit is that of the largest of ``want`` and ``magnitudes`` at each element: where a sum
    cancels, what it was rounded from decides how far apart two results may lie.
    """
    size = want.double().abs()
    for other in magnitudes:
        size = torch.maximum(size, other.double().abs())
    size = size.clamp(min=torch.finfo(torch.float16).tiny)
    unit = torch.exp2(torch.floor(torch.log2(size)) - (MANTISSA[dtype] - 1))
    return float(((got.double() - want.double()).abs() / unit).max())


def split(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """`unflatten`, which torch gives no types."""
    parts: Tensor = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return parts


def exact_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The norm in float64."""
    x64 = x.double()
    return x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + eps) * gain.double()


def exact_rope(x: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding in float64, by complex multiplication. ``cos_sin``: [..., rotary_dim]."""
    x64, (cos, sin) = x.double().clone(), cos_sin.double().unsqueeze(-2).chunk(2, dim=-1)
    turning = x64[..., : cos_sin.shape[-1]]
    pairs = split(turning, -1, (-1, 2) if interleaved else (2, -1))
    axis = -1 if interleaved else -2
    turned = torch.complex(*pairs.unbind(axis)) * torch.complex(cos, sin)
    turning.copy_(torch.stack((turned.real, turned.imag), dim=axis).flatten(-2))
    return x64


def table(positions: int, rotary_dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """The cosines and sines that models hold: [positions, rotary_dim], theta 10,000."""
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(positions)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device, dtype)


def fused_qkv(
    tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """A fused tensor [tokens, (q_heads + 2 * k_heads) * head_dim] and its q and k as heads."""
    q_heads, k_heads, size = heads
    qkv = rows((tokens, (q_heads + 2 * k_heads) * size), dtype, 21, device)
    parts = split(qkv, 1, (-1, size))
    return qkv, parts[:, :q_heads], parts[:, q_heads : q_heads + k_heads]


def pair_sizes(x: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """float64 size of the pair that each element of ``x`` is rotated in: it bounds the result."""
    sizes = x.double().abs()
    turning = sizes[..., :rotary_dim]
    shape = (-1, 2) if interleaved else (2, -1)
    pairs = split(turning, -1, shape)
    length = pairs.square().sum(-1 if interleaved else -2, keepdim=True).sqrt()
    turning.copy_(length.expand_as(pairs).flatten(-2))
    return sizes


def check_in_place(x: Tensor, residual: Tensor, post: Tensor, pre: Tensor, eps: float) -> None:
    """The operators that work in place leave the bits that the others return."""
    cases: tuple[tuple[tuple[Tensor, Tensor], Write], ...] = (
        (ops.add_rms_norm(x, residual, post, eps), lambda a, b: ops.add_rms_norm_(a, b, post, eps)),
        (
            ops.rms_norm_add_rms_norm(x, residual, post, pre, eps, 1e-5),
            lambda a, b: ops.rms_norm_add_rms_norm_(a, b, post, pre, eps, 1e-5),
        ),
    )
    for values, write in cases:
        written = x.clone(), residual.clone()
        write(*written)
        for got, want in zip(written, values, strict=True):
            assert torch.equal(got, want)
