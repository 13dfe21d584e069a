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
    UNIT: tl.constexpr,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    M: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    NVIDIA: tl.constexpr,  # compiled for NVIDIA: neither ROCm nor the interpreter
    PDL: tl.constexpr,
    FENCE: tl.constexpr,
    GAMMA: tl.constexpr,  # when it is read: FIRST, WITH_ROWS or LAST
    STORE: tl.constexpr,  # cache modifier of the stores
):
    rows = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    live = rows < n_rows
    wide = rows.to(tl.int64)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if GAMMA == R.FIRST:
        gamma = R.load_gamma(gamma_ptr, rows, live, H, CHUNK, M, GAMMA)
    R.wait_for_previous(PDL)
    x = R.load(x_ptr, wide * (x_step * UNIT), live, H, CHUNK, M, "")
    residual = R.load(residual_ptr, wide * (residual_step * UNIT), live, H, CHUNK, M, "")
    if GAMMA == R.WITH_ROWS:
        gamma = R.load_gamma(gamma_ptr, rows, live, H, CHUNK, M, GAMMA)
    R.fence(FENCE, PDL)
    total = R.add(residual, x, dtype)
    R.store(total_ptr, wide * H, live, total, H, CHUNK, M, STORE)
    rstd = R.inverse_rms(total, eps, H, dtype)
    if GAMMA == R.LAST:
        gamma = R.load_gamma(gamma_ptr, rows, live, H, CHUNK, M, GAMMA)
    y = R.scale(total, rstd, gamma, tl.float32)  # rounded by the store or by the quantisation
    if scale_ptr is not None:
        y = R.quantize(y, scale_ptr, rows, live, dtype, PER_TOKEN, NVIDIA)
    R.store(y_ptr, wide * H, live, y, H, CHUNK, M, STORE)
