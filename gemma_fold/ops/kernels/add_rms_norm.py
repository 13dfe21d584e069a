"""Residual add and RMSNorm in one pass, optionally quantised to e4m3."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma_fold.ops.kernels import rows as R


@triton.jit(do_not_specialize=["n_rows", "x_step", "residual_step"])
def add_rms_norm_kernel(
    x_ptr,  # [n_rows, H] bf16/fp16/fp32, row stride x_step * UNIT
    residual_ptr,  # [n_rows, H] dtype of x, row stride residual_step * UNIT
    gamma_ptr,  # [H] fp32
    y_ptr,  # [n_rows, H] dtype of x, or e4m3; contiguous
    total_ptr,  # [n_rows, H] dtype of x: residual + x; contiguous
    scale_ptr,  # fp32: [1] read (static) or [n_rows] written (per token); None without fp8
    n_rows,
    x_step: tl.int64,
    residual_step: tl.int64,
    eps,
    UNIT: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, M: tl.constexpr,
    PER_TOKEN: tl.constexpr, NVIDIA: tl.constexpr, PDL: tl.constexpr, FENCE: tl.constexpr,
    GAMMA: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    rows, live, wide = R.numbered(n_rows, M)
    gamma = R.load_gamma(R.FIRST, (), gamma_ptr, rows, live, H, CHUNK, M, GAMMA)
    R.wait_for_previous(PDL)
    x = R.load(x_ptr, wide * (x_step * UNIT), live, H, CHUNK, M, "")
    residual = R.load(residual_ptr, wide * (residual_step * UNIT), live, H, CHUNK, M, "")
    gamma = R.load_gamma(R.WITH_ROWS, gamma, gamma_ptr, rows, live, H, CHUNK, M, GAMMA)
    R.fence(FENCE, PDL)
    total = R.add(residual, x)
    R.finish(
        y_ptr, total_ptr, scale_ptr, rows, live, total, eps, gamma_ptr, gamma,
        H, CHUNK, M, PER_TOKEN, NVIDIA, GAMMA, STORE,
    )  # fmt: skip
