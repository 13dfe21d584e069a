"""One implementation per operator: check the operands, then run Triton or the reference.

CUDA tensors go to the Triton kernels. CPU tensors go to the reference, or, when Triton's
interpreter is on (``TRITON_INTERPRET=1``), through the very same kernels.
"""

from __future__ import annotations

from torch import Tensor

from gemma_fold.kernels import layout, reference

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


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    check_rms_norm(x, gamma)
    return reference.rms_norm(x, gamma, eps)


def rms_norm_backward(grad: Tensor, x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_rms_norm(x, gamma)
    return reference.rms_norm_backward(grad, x, gamma, eps)


def add_rms_norm(x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_add(x, residual, gamma)
    return reference.add_rms_norm(x, residual, gamma, eps)


def rms_norm_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
) -> tuple[Tensor, Tensor]:
    check_sandwich(x, residual, post_gamma, pre_gamma)
    return reference.rms_norm_add_rms_norm(x, residual, post_gamma, pre_gamma, post_eps, pre_eps)


def qk_rms_norm(q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor, eps: float) -> None:
    check_qk(q, k, q_gamma, k_gamma)
    reference.qk_rms_norm(q, k, q_gamma, k_gamma, eps)


def rms_norm_fp8(x: Tensor, gamma: Tensor, eps: float, scale: Tensor | None) -> Fp8Pair:
    check_rms_norm(x, gamma)
    layout.check_scale(scale, x)
    return reference.quantize(reference.rms_norm(x, gamma, eps), scale)


def add_rms_norm_fp8(
    x: Tensor, residual: Tensor, gamma: Tensor, eps: float, scale: Tensor | None
) -> Fp8Triple:
    check_add(x, residual, gamma)
    layout.check_scale(scale, x)
    y, total = reference.add_rms_norm(x, residual, gamma, eps)
    return (*reference.quantize(y, scale), total)


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
    y, total = reference.rms_norm_add_rms_norm(
        x, residual, post_gamma, pre_gamma, post_eps, pre_eps
    )
    return (*reference.quantize(y, scale), total)
