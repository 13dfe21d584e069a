"""What the kernel tests share: inputs, units in the last place, and float64 oracles."""

from __future__ import annotations

import torch
from torch import Tensor

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


def exact_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The norm in float64."""
    x64 = x.double()
    return x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + eps) * gain.double()
