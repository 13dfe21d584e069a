"""RMSNorm of all q heads and all k heads in one launch, in place or not."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma_fold.ops.kernels import rows as R

STEPS = ["q_step", "k_step", "q_head_step", "k_head_step"]


@triton.jit
def either(first, one, other, cols):
    """The columns ``cols`` of the rows at ``one`` where ``first`` [M, 1], else at ``other``.

    A pointer is chosen, not a value: only the row that is wanted is loaded. Columns are added
    before the choice, because Triton 3.8 forgets how a chosen [M, 1] pointer is aligned and then
    moves one element at a time.
    """
    return tl.where(first, one + cols, other + cols)


@triton.jit
def heads(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_gamma_ptr, k_gamma_ptr, n_rows,
    q_step, k_step, q_head_step, k_head_step,
    out_q_step, out_k_step, out_q_head_step, out_k_head_step,
    UNIT: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, M: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """The heads of this program: what to read, write and scale by, [M, BLOCK], and what is there.

    Returns also the row and the token of each head, [M, 1].
    """
    rows = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    live = (rows < n_rows) & (cols < H)
    token = (rows // (Q_HEADS + K_HEADS)).to(tl.int64)
    head = (rows % (Q_HEADS + K_HEADS)).to(tl.int64)
    is_q = head < Q_HEADS
    q_at = q_ptr + (token * q_step + head * q_head_step) * UNIT
    k_at = k_ptr + (token * k_step + (head - Q_HEADS) * k_head_step) * UNIT
    at = either(is_q, q_at, k_at, cols)
    if IN_PLACE:
        out_at = at
    else:
        q_out_at = q_out_ptr + (token * out_q_step + head * out_q_head_step) * UNIT
        k_out_at = k_out_ptr + (token * out_k_step + (head - Q_HEADS) * out_k_head_step) * UNIT
        out_at = either(is_q, q_out_at, k_out_at, cols)
    gamma_at = either(is_q, q_gamma_ptr, k_gamma_ptr, cols)
    return at, out_at, gamma_at, live, rows, token


@triton.jit(do_not_specialize=["n_rows", *STEPS, *(f"out_{step}" for step in STEPS)])
def qk_rms_norm_kernel(
    q_ptr,  # [tokens, Q_HEADS, H] bf16/fp16/fp32; strides q_step * UNIT, q_head_step * UNIT, 1
    k_ptr,  # [tokens, K_HEADS, H] dtype of q; strides k_step * UNIT, k_head_step * UNIT, 1
    q_out_ptr,  # as q, with strides out_q_step * UNIT, out_q_head_step * UNIT, 1
    k_out_ptr,  # as k, with strides out_k_step * UNIT, out_k_head_step * UNIT, 1
    q_gamma_ptr,  # [H] fp32
    k_gamma_ptr,  # [H] fp32
    n_rows,  # tokens * (Q_HEADS + K_HEADS)
    q_step: tl.int64, k_step: tl.int64, q_head_step: tl.int64, k_head_step: tl.int64,
    out_q_step: tl.int64, out_k_step: tl.int64, out_q_head_step: tl.int64,
    out_k_head_step: tl.int64, eps,
    UNIT: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, M: tl.constexpr, PDL: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    at, out_at, gamma_at, live, _, _ = heads(
        q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_gamma_ptr, k_gamma_ptr, n_rows, q_step, k_step,
        q_head_step, k_head_step, out_q_step, out_k_step, out_q_head_step, out_k_head_step,
        UNIT, Q_HEADS, K_HEADS, H, BLOCK, M, IN_PLACE,
    )  # fmt: skip
    R.wait_for_previous(PDL)
    x = tl.load(at, mask=live, other=0.0)
    gamma = tl.load(gamma_at, mask=live, other=0.0)
    R.fence(True, PDL)
    x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
    tl.store(out_at, (x * rstd * gamma).to(q_ptr.dtype.element_ty), mask=live)
