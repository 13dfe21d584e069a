"""One implementation per operator: check the operands, then run Triton or the reference.

CUDA tensors go to the Triton kernels. CPU tensors go to the reference, or, when Triton's
interpreter is on (``TRITON_INTERPRET=1``), through the very same kernels.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from gemma_fold.kernels import layout, reference
from gemma_fold.kernels.reference import FP8

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Fp8Pair = tuple[Tensor, Tensor]
Fp8Triple = tuple[Tensor, Tensor, Tensor]


def check_rms_norm(x: Tensor, gamma: Tensor) -> None:
    layout.check_activation(x, "x")
    layout.check_gamma(gamma, x, "gamma")


def check_add(x: Tensor, residual: Tensor, gamma: Tensor) -> None:
    check_rms_norm(x, gamma)
    layout.check_same(residual, x, "residual")


def check_sandwich(x: Tensor, residual: Tensor, post_gamma: Tensor, pre_gamma: Tensor) -> None:
    layout.check_activation(x, "x")
    layout.check_gamma(post_gamma, x, "post_gamma")
    layout.check_gamma(pre_gamma, x, "pre_gamma")
    layout.check_same(residual, x, "residual")


def check_qk(q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor) -> None:
    for name, heads, gamma in (("q", q, q_gamma), ("k", k, k_gamma)):
        layout.check_activation(heads, name)
        layout.check_gamma(gamma, heads, f"{name}_gamma")
        if heads.dim() < 2:
            raise ValueError(f"{name} must be [..., heads, head_dim], not {list(heads.shape)}")
    if q.dtype != k.dtype or q.device != k.device:
        raise TypeError(f"q ({q.dtype}, {q.device}) and k ({k.dtype}, {k.device}) must match")
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} may differ only in heads")


@cache
def _launch() -> ModuleType:
    """The Triton side, imported when it is first needed: CPU users need no Triton."""
    from gemma_fold.kernels import launch

    return launch


def _reference_runs(x: Tensor) -> bool:
    return not (x.is_cuda or _INTERPRETED)


def _scale_for(x: Tensor, scale: Tensor | None) -> Tensor:
    """Where the kernel reads the static scale, or writes one scale per row."""
    if scale is not None:
        return scale
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    check_rms_norm(x, gamma)
    if _reference_runs(x):
        return reference.rms_norm(x, gamma, eps)
    order = layout.memory_order(x)
    if order is not None:
        return rms_norm(x.permute(order), gamma, eps).permute(layout.inverse(order))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch().rms_norm(x, gamma, eps, y, None, False)
    return y


def rms_norm_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    check_rms_norm(x, gamma)
    layout.check_same(grad, x, "grad")
    if _reference_runs(x):
        return reference.rms_norm_backward(grad, x, gamma, eps)
    x, grad = x.contiguous(), grad.contiguous()
    dx = torch.empty_like(x)
    return dx, _launch().rms_norm_backward(grad, x, gamma, eps, dx)


def add_rms_norm(x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_add(x, residual, gamma)
    if _reference_runs(x):
        return reference.add_rms_norm(x, residual, gamma, eps)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y)
    _launch().add_rms_norm(x, residual, gamma, eps, y, total, None, False)
    return y, total


def rms_norm_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
) -> tuple[Tensor, Tensor]:
    check_sandwich(x, residual, post_gamma, pre_gamma)
    operands = (x, residual, post_gamma, pre_gamma, post_eps, pre_eps)
    if _reference_runs(x):
        return reference.rms_norm_add_rms_norm(*operands)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y)
    _launch().rms_norm_add_rms_norm(*operands, y, total, None, False)
    return y, total


def qk_rms_norm(q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor, eps: float) -> None:
    check_qk(q, k, q_gamma, k_gamma)
    if _reference_runs(q):
        reference.qk_rms_norm(q, k, q_gamma, k_gamma, eps)
    else:
        _launch().qk_rms_norm(q, k, q_gamma, k_gamma, eps)


def rms_norm_fp8(x: Tensor, gamma: Tensor, eps: float, scale: Tensor | None) -> Fp8Pair:
    check_rms_norm(x, gamma)
    layout.check_scale(scale, x)
    if _reference_runs(x):
        return reference.quantize(reference.rms_norm(x, gamma, eps), scale)
    y, scales = x.new_empty(x.shape, dtype=FP8), _scale_for(x, scale)
    _launch().rms_norm(x, gamma, eps, y, scales, scale is None)
    return y, scales


def add_rms_norm_fp8(
    x: Tensor, residual: Tensor, gamma: Tensor, eps: float, scale: Tensor | None
) -> Fp8Triple:
    check_add(x, residual, gamma)
    layout.check_scale(scale, x)
    if _reference_runs(x):
        y, total = reference.add_rms_norm(x, residual, gamma, eps)
        return (*reference.quantize(y, scale), total)
    y, scales = x.new_empty(x.shape, dtype=FP8), _scale_for(x, scale)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch().add_rms_norm(x, residual, gamma, eps, y, total, scales, scale is None)
    return y, scales, total


def rms_norm_add_rms_norm_fp8(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
    scale: Tensor | None,
) -> Fp8Triple:
    check_sandwich(x, residual, post_gamma, pre_gamma)
    layout.check_scale(scale, x)
    operands = (x, residual, post_gamma, pre_gamma, post_eps, pre_eps)
    if _reference_runs(x):
        y, total = reference.rms_norm_add_rms_norm(*operands)
        return (*reference.quantize(y, scale), total)
    y, scales = x.new_empty(x.shape, dtype=FP8), _scale_for(x, scale)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch().rms_norm_add_rms_norm(*operands, y, total, scales, scale is None)
    return y, scales, total
