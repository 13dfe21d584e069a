"""RMSNorm with fp32 gain, and its gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_fold.ops import checks
from gemma_fold.ops.operators.base import (
    LIBRARY,
    NAMESPACE,
    RowOperator,
    arguments_of,
    register,
)

if TYPE_CHECKING:
    from gemma_fold.ops.launch import Plan

_BACKWARD_PROGRAMS_PER_SM = 4


def reference(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """``x``: [..., H]; ``gamma``: fp32 [H]. Returns [..., H] in the dtype of ``x``."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * gamma).to(x.dtype)


def reference_backward(grad: Tensor, x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the norm: ``dx`` [..., H] in the dtype of ``x``, ``dgamma`` fp32 [H]."""
    x32, grad32 = x.float(), grad.float()
    rstd = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    x_hat, scaled = x32 * rstd, grad32 * gamma
    dx = rstd * (scaled - x_hat * (scaled * x_hat).mean(-1, keepdim=True))
    dgamma = (grad32 * x_hat).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dgamma


def plan(
    x: Tensor, residual: None = None, fp8: str | None = None, *, zero_centered: bool = False
) -> Plan:
    """Called with ``(x, gamma, y, scale), (eps,)``; zero_centered: with gamma - 1."""
    from gemma_fold.ops import launch
    from gemma_fold.ops.kernels.rms_norm import rms_norm_kernel

    rows, _ = launch.row_size(x)
    return launch.plan_rows(
        rms_norm_kernel,
        x,
        None,
        fp8,
        crowded=2 if fp8 else 4,
        fence=rows > launch.LONE_ROWS,  # of few rows only x is loaded after the wait
        zero_centered=zero_centered,
    )


operator = RowOperator[Tensor]("rms_norm", reference, plan)


def rms_norm(x: Tensor, gamma: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm with fp32 gain. ``x``: [..., H]; ``gamma``: fp32 [H]. Differentiable in both.

    Derivatives of any order and tangents are those of the plain formula.
    Returns [..., H] in the dtype of ``x``. ``x`` may have any row stride, be heads
    [..., heads, H] cut out of a wider tensor, or have its leading dimensions transposed; the
    columns must be contiguous.
    """
    return operator.call((x, gamma), (eps,))


def rms_norm_fp8(
    x: Tensor, gamma: Tensor, eps: float = 1e-6, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm`, then quantisation to float8_e4m3fn. Returns ``(y, scale)``.

    ``scale`` is fp32 with one element (static: ``y = norm / scale``, saturating, and it is
    returned as it is), or None: one scale per token, fp32 [..., 1], the row's largest magnitude
    over 448 and at least 1 / (448 * 512). The norm is rounded to the dtype of ``x`` first, as in
    the unfused sequence. Not differentiable.
    """
    y, scales = operator.call_fp8((x, gamma), (eps,), scale)
    return y, scales


def plan_backward(x: Tensor, grad: Tensor) -> Plan:
    """Called with ``(grad, x, gamma, dx, partial), (eps,)``; ``partial``: fp32 [programs, H]."""
    from gemma_fold.ops import launch
    from gemma_fold.ops.kernels.rms_norm_backward import rms_norm_backward_kernel

    rows, _ = launch.row_size(x)
    strides = checks.row_stride(x, "x"), checks.row_stride(grad, "grad")
    unit, steps = launch.steps(x, strides)
    block = 1 << (x.shape[-1] - 1).bit_length()
    constants = {"UNIT": unit, "H": x.shape[-1], "BLOCK": block}
    at_once = 4
    if not checks.INTERPRETED:
        properties = torch.cuda.get_device_properties(x.device)
        at_once = properties.multi_processor_count * _BACKWARD_PROGRAMS_PER_SM
    warps = min(16, max(1, block // 512))
    programs = min(rows, at_once)
    return launch.Plan(rms_norm_backward_kernel, x, programs, (rows, *steps), constants, warps)


def _run_backward(grad: Tensor, x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    operator.check(x, gamma)
    checks.check_same(grad, x, "grad")
    if checks.reference_runs(x):
        dx, dgamma = reference_backward(grad, x, gamma, eps)
        return dx.contiguous(), dgamma
    x, grad = x.contiguous(), grad.contiguous()
    launches = plan_backward(x, grad)
    dx = torch.empty_like(x)
    partial = x.new_empty((launches.programs, x.shape[-1]), dtype=torch.float32)
    launches((grad, x, gamma, dx, partial), (eps,))
    return dx, partial.sum(0)


_backward = register(
    "rms_norm_backward",
    arguments_of(reference_backward),
    2,
    _run_backward,
    lambda grad, x, gamma, eps: (x.new_empty(x.shape), torch.empty_like(gamma)),
)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    x, gamma, ctx.eps = inputs
    ctx.save_for_backward(x, gamma)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    # create_graph: the gradient is differentiated, too, for which the kernel has no backward.
    again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    x, gamma = ctx.saved_tensors
    dx, dgamma = (reference_backward if again else _backward)(grad, x, gamma, ctx.eps)
    return dx, dgamma, None


torch.library.register_autograd(
    f"{NAMESPACE}::rms_norm", _differentiate, setup_context=_save, lib=LIBRARY
)
