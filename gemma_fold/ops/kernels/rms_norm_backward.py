"""Gradients of RMSNorm: dx per row, and fp32 partial sums of dgamma per program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_rows", "x_step", "grad_step"])
def rms_norm_backward_kernel(
    grad_ptr,  # [n_rows, H] dtype of x, row stride grad_step * UNIT
    x_ptr,  # [n_rows, H] bf16/fp16/fp32, row stride x_step * UNIT
    gamma_ptr,  # [H] fp32
    dx_ptr,  # [n_rows, H] dtype of x, contiguous
    partial_ptr,  # [programs, H] fp32: each program's share of dgamma
    n_rows,
    x_step: tl.int64,
    grad_step: tl.int64,
    eps,
    UNIT: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= H
):
    first = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    gamma = tl.load(gamma_ptr + cols, mask=inside, other=0.0)
    dgamma = tl.zeros((BLOCK,), tl.float32)
    row = first
    while row < n_rows:
        wide = row.to(tl.int64)
        x = tl.load(x_ptr + wide * (x_step * UNIT) + cols, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + wide * (grad_step * UNIT) + cols, mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x) / H + eps)
        x_hat = x * rstd
        scaled = grad * gamma
        dx = rstd * (scaled - x_hat * (tl.sum(scaled * x_hat) / H))
        tl.store(dx_ptr + wide * H + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dgamma += grad * x_hat
        row += tl.num_programs(0)
    tl.store(partial_ptr + first.to(tl.int64) * H + cols, dgamma, mask=inside)
