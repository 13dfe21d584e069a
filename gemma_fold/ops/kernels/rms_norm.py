"""RMSNorm with fp32 gamma, optionally quantised to e4m3, or with a zero-centred weight."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma_fold.ops.kernels import rows as R


@triton.jit(do_not_specialize=["n_rows", "x_step"])
def rms_norm_kernel(
    x_ptr,  # [n_rows / HEADS, HEADS, H] bf16/fp16/fp32, strides x_step and HEAD_STEP in UNITs, 1
    gamma_ptr,  # [H] fp32; ZERO_CENTERED: gamma - 1, bf16/fp16/fp32
    y_ptr,  # [n_rows, H] dtype of x, or e4m3; contiguous
    scale_ptr,  # fp32: [1] read (static) or [n_rows] written (per token); None without fp8
    n_rows,
    x_step: tl.int64,
    eps,
    UNIT: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, M: tl.constexpr,
    PER_TOKEN: tl.constexpr, NVIDIA: tl.constexpr, PDL: tl.constexpr, FENCE: tl.constexpr,
    GAMMA: tl.constexpr, STORE: tl.constexpr,
    HEADS: tl.constexpr,  # rows of a token, where they are not the stride of tokens apart
    HEAD_STEP: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,  # never with a gamma that is read LAST
):  # fmt: skip
    rows, live, wide = R.numbered(n_rows, M)
    gamma = R.load_gamma(R.FIRST, (), gamma_ptr, rows, live, H, CHUNK, M, GAMMA)
    R.wait_for_previous(PDL)
    if HEADS == 1:
        at = wide * (x_step * UNIT)
    else:
        at = (wide // HEADS) * (x_step * UNIT) + (wide % HEADS) * (HEAD_STEP * UNIT)
    x = R.load(x_ptr, at, live, H, CHUNK, M, "")
    gamma = R.load_gamma(R.WITH_ROWS, gamma, gamma_ptr, rows, live, H, CHUNK, M, GAMMA)
    R.fence(FENCE, PDL)
    if ZERO_CENTERED:
        gamma = R.plus_one(gamma)
    R.finish(
        y_ptr, None, scale_ptr, rows, live, x, eps, gamma_ptr, gamma,
        H, CHUNK, M, PER_TOKEN, NVIDIA, GAMMA, STORE,
    )  # fmt: skip
