"""The Gemma 2/3 sandwich in one pass: post-norm, residual add, next pre-norm; optionally e4m3."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma_fold.ops.kernels import rows as R


@triton.jit(do_not_specialize=["n_rows", "x_step", "residual_step"])
def rms_norm_add_rms_norm_kernel(
    x_ptr,  # [n_rows, H] bf16/fp16/fp32, row stride x_step * UNIT
    residual_ptr,  # [n_rows, H] dtype of x, row stride residual_step * UNIT
    post_gamma_ptr,  # [H] fp32: gain of the norm of x
    pre_gamma_ptr,  # [H] fp32: gain of the norm of the sum
    y_ptr,  # [n_rows, H] dtype of x, or e4m3; contiguous
    total_ptr,  # [n_rows, H] dtype of x: residual + norm(x); contiguous
    scale_ptr,  # fp32: [1] read (static) or [n_rows] written (per token); None without fp8
    n_rows,
    x_step: tl.int64,
    residual_step: tl.int64,
    post_eps,
    pre_eps,
    UNIT: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, M: tl.constexpr,
    PER_TOKEN: tl.constexpr, NVIDIA: tl.constexpr, PDL: tl.constexpr, FENCE: tl.constexpr,
    GAMMA: tl.constexpr, STORE: tl.constexpr,  # LAST is pre_gamma alone
):  # fmt: skip
    POST: tl.constexpr = R.FIRST if GAMMA == R.FIRST else R.WITH_ROWS
    rows, live, wide = R.numbered(n_rows, M)
    post_gamma = R.load_gamma(R.FIRST, (), post_gamma_ptr, rows, live, H, CHUNK, M, POST)
    pre_gamma = R.load_gamma(R.FIRST, (), pre_gamma_ptr, rows, live, H, CHUNK, M, GAMMA)
    R.wait_for_previous(PDL)
    x = R.load(x_ptr, wide * (x_step * UNIT), live, H, CHUNK, M, "")
    residual = R.load(residual_ptr, wide * (residual_step * UNIT), live, H, CHUNK, M, "")
    post_gamma = R.load_gamma(
        R.WITH_ROWS, post_gamma, post_gamma_ptr, rows, live, H, CHUNK, M, POST
    )
    pre_gamma = R.load_gamma(R.WITH_ROWS, pre_gamma, pre_gamma_ptr, rows, live, H, CHUNK, M, GAMMA)
    R.fence(FENCE, PDL)
    normed = R.scale(x, R.inverse_rms(x, post_eps, H), post_gamma, x[0].dtype)
    total = R.add(residual, normed)
    R.finish(
        y_ptr, total_ptr, scale_ptr, rows, live, total, pre_eps, pre_gamma_ptr, pre_gamma,
        H, CHUNK, M, PER_TOKEN, NVIDIA, GAMMA, STORE,
    )  # fmt: skip
