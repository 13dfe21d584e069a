"""Residual add and RMSNorm in one pass, optionally quantised to e4m3."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemma_fold.kernels import rows as R


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
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    live = rows < n_rows
    wide = rows.to(tl.int64)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if PDL:
        # The next kernel may be placed at once: it waits for this one before it reads.
        gdc_launch_dependents()
        gdc_wait()
    x = R.load(x_ptr, wide * (x_step * UNIT), live, H, CHUNK, M)
    residual = R.load(residual_ptr, wide * (residual_step * UNIT), live, H, CHUNK, M)
    gamma = R.load(gamma_ptr, tl.zeros_like(rows), live, H, CHUNK, M)
    total = R.add(residual, x, dtype)
    R.store(total_ptr, wide * H, live, total, H, CHUNK, M)
    y = R.normalize(total, gamma, eps, dtype, H)
    if scale_ptr is not None:
        y = R.quantize(y, scale_ptr, rows, live, PER_TOKEN)
    R.store(y_ptr, wide * H, live, y, H, CHUNK, M)
