"""RMSNorm of all q and k heads, then rotary embedding, in one launch, in place or not."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma_fold.ops.kernels import rows as R
from gemma_fold.ops.kernels.qk_rms_norm import STEPS, heads


@triton.jit
def _multiply(a, b, dtype: tl.constexpr, NVIDIA: tl.constexpr):
    """fp32 ``a * b`` rounded to ``dtype``, never fused with the addition that follows."""
    if dtype != tl.float32:
        product = R.rounded(a * b, dtype, NVIDIA)
    elif NVIDIA:
        product = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        product = a * b
    return product


@triton.jit
def _other_half(x, cols, H2: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr):
    """The column that each column of fp32 ``x`` [M, BLOCK] is rotated with, H2 columns away.

    Where H2 is a power of two, the exclusive or of the pair leaves the other one: shuffles inside
    the warp, without a change of layout.
    """
    if H2 & (H2 - 1) == 0:
        bits = tl.reshape(x.to(tl.int32, bitcast=True), [M, BLOCK // (2 * H2), 2, H2])
        bits = bits ^ tl.xor_sum(bits, axis=2, keep_dims=True)
        other = tl.reshape(bits, [M, BLOCK]).to(tl.float32, bitcast=True)
    else:
        at = tl.where(cols < H2, cols + H2, tl.where(cols < 2 * H2, cols - H2, cols))
        other = tl.gather(x, tl.broadcast_to(at, [M, BLOCK]), axis=1)
    return other


@triton.jit
def _rotate(
    y,
    cos,
    sin,
    H2: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    dtype: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """``y`` [M, BLOCK] with its first 2 * H2 columns rotated; products round to ``dtype``.

    ``cos``, ``sin``: fp32 [M, BLOCK], one for each column, or [M, BLOCK / 2] if INTERLEAVED.
    """
    if INTERLEAVED:
        rotates = tl.arange(0, BLOCK // 2)[None, :] < H2
        y1, y2 = tl.split(tl.reshape(y, [M, BLOCK // 2, 2]))
        out1 = _multiply(y1, cos, dtype, NVIDIA) - _multiply(y2, sin, dtype, NVIDIA)
        out2 = _multiply(y2, cos, dtype, NVIDIA) + _multiply(y1, sin, dtype, NVIDIA)
        pairs = tl.join(tl.where(rotates, out1, y1), tl.where(rotates, out2, y2))
        out = tl.reshape(pairs, [M, BLOCK])
    else:
        cols = tl.arange(0, BLOCK)[None, :]
        other = _other_half(y, cols, H2, BLOCK, M)
        sin = tl.where(cols < H2, -sin, sin)
        out = _multiply(y, cos, dtype, NVIDIA) + _multiply(other, sin, dtype, NVIDIA)
        out = tl.where(cols < 2 * H2, out, y)
    return out


@triton.jit
def turning(BLOCK: tl.constexpr, H2: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pair of each column, and whether it rotates: [1, BLOCK], or [1, BLOCK / 2] of pairs."""
    if INTERLEAVED:
        pair = tl.arange(0, BLOCK // 2)[None, :]
        rotates = pair < H2
    else:
        cols = tl.arange(0, BLOCK)[None, :]
        pair = cols % H2
        rotates = cols < 2 * H2
    return pair, rotates


@triton.jit
def load_turns(
    cos_sin_ptr, position, step, n_positions, pair, wanted, H2: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Cosines and sines of each ``pair`` at ``position``, where ``wanted``.

    A position that the table does not hold reads nothing and gives NaN.
    """
    held = (position >= 0) & (position < n_positions) & wanted
    at = cos_sin_ptr + position * (step * UNIT) + pair
    cos = tl.load(at, mask=held, other=float("nan"))
    sin = tl.load(at + H2, mask=held, other=float("nan"))
    return cos, sin


@triton.jit
def norm_and_rotate(
    x, gamma, cos, sin, eps, H: tl.constexpr, H2: tl.constexpr, BLOCK: tl.constexpr,
    M: tl.constexpr, INTERLEAVED: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """fp32 heads [M, BLOCK], normed, rounded to the dtype of ``x`` and rotated.

    Products are rounded to the dtype of ``cos``: torch computes them in the wider of the two.
    """
    dtype: tl.constexpr = x.dtype
    product_dtype: tl.constexpr = cos.dtype
    x = x.to(tl.float32)
    cos = cos.to(tl.float32)
    sin = sin.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
    y = R.rounded(x * rstd * gamma, dtype, NVIDIA)
    return _rotate(y, cos, sin, H2, BLOCK, M, INTERLEAVED, product_dtype, NVIDIA)


@triton.jit(
    do_not_specialize=[
        "n_rows",
        *STEPS,
        *(f"out_{step}" for step in STEPS),
        "cos_sin_step",
        "n_positions",
    ]
)
def qk_rms_norm_rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_gamma_ptr, k_gamma_ptr,  # as in qk_rms_norm_kernel
    cos_sin_ptr,  # [n_positions, 2 * H2] dtype of q or fp32: cosines, sines; row stride
    # cos_sin_step * COS_SIN_UNIT
    positions_ptr,  # [tokens] int32/int64: the row of each token; None: the row of its number
    n_rows,  # tokens * (Q_HEADS + K_HEADS)
    q_step: tl.int64, k_step: tl.int64, q_head_step: tl.int64, k_head_step: tl.int64,
    out_q_step: tl.int64, out_k_step: tl.int64, out_q_head_step: tl.int64,
    out_k_head_step: tl.int64, cos_sin_step: tl.int64, n_positions: tl.int64, eps,
    UNIT: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, M: tl.constexpr, PDL: tl.constexpr, IN_PLACE: tl.constexpr,
    COS_SIN_UNIT: tl.constexpr,
    H2: tl.constexpr,  # pairs that are rotated: half of rotary_dim
    NVIDIA: tl.constexpr,  # compiled for NVIDIA: neither ROCm nor the interpreter
    INTERLEAVED: tl.constexpr,  # pairs are neighbours, not halves
):  # fmt: skip
    at, out_at, gamma_at, live, rows, token = heads(
        q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_gamma_ptr, k_gamma_ptr, n_rows, q_step, k_step,
        q_head_step, k_head_step, out_q_step, out_k_step, out_q_head_step, out_k_head_step,
        UNIT, Q_HEADS, K_HEADS, H, BLOCK, M, IN_PLACE,
    )  # fmt: skip
    pair, rotates = turning(BLOCK, H2, INTERLEAVED)
    R.wait_for_previous(PDL)
    if positions_ptr is None:
        position = token
    else:
        position = tl.load(positions_ptr + token, mask=rows < n_rows, other=0).to(tl.int64)
    x = tl.load(at, mask=live, other=0.0)
    gamma = tl.load(gamma_at, mask=live, other=0.0)
    cos, sin = load_turns(
        cos_sin_ptr, position, cos_sin_step, n_positions, pair, rotates, H2, COS_SIN_UNIT
    )
    R.fence(True, PDL)
    out = norm_and_rotate(x, gamma, cos, sin, eps, H, H2, BLOCK, M, INTERLEAVED, NVIDIA)
    tl.store(out_at, out.to(q_ptr.dtype.element_ty), mask=live)
