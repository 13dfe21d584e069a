"""tanh GELU of the gates, times what they scale, for rows that hold both."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu_mul_kernel(
    x_ptr,  # [rows, 2 * I] bf16/fp16/fp32, contiguous: gates, then what they scale
    y_ptr,  # [rows, I] dtype of x, contiguous
    width,  # I
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < width
    gate = tl.load(x_ptr + row * 2 * width + cols, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + (row * 2 + 1) * width + cols, mask=live, other=0.0).to(tl.float32)
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    tanh = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * inner))
    y = 0.5 * gate * (1.0 + tanh) * up
    tl.store(y_ptr + row * width + cols, y.to(y_ptr.dtype.element_ty), mask=live)
