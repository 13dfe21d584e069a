"""RMSNorm and rotary embedding of q and k heads, and the paged cache's write, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma_fold.ops.kernels import rows as R
from gemma_fold.ops.kernels.qk_rms_norm import either
from gemma_fold.ops.kernels.qk_rms_norm_rope import load_turns, norm_and_rotate, turning

# Whose position turns a pair, where a token has three: one for all, by thirds, or in turn.
ONE: tl.constexpr = tl.constexpr(0)
SECTIONS: tl.constexpr = tl.constexpr(1)
IN_TURN: tl.constexpr = tl.constexpr(2)

#: Strides, in the order in which kernels take them.
STEPS = [
    *("q_step", "k_step", "v_step", "q_head_step", "k_head_step", "v_head_step"),
    *("out_q_step", "out_q_head_step", "cos_sin_step"),
]
_SIZES = ["n_rows", "n_positions", "axis_step", "block_step", "slot_step", "cache_head_step"]


@triton.jit
def _position(
    positions_ptr, axis_step, token, exists, pair, AXES: tl.constexpr, T: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The row of the table for each token [M, 1], or for each of its pairs."""
    if positions_ptr is None:
        position = token
    else:
        at = positions_ptr + token
        position = tl.load(at, mask=exists, other=0).to(tl.int64)
        if AXES != ONE:
            height = tl.load(at + axis_step, mask=exists, other=0).to(tl.int64)
            width = tl.load(at + 2 * axis_step, mask=exists, other=0).to(tl.int64)
            if AXES == SECTIONS:
                is_height = (pair >= T) & (pair < T + HEIGHT)
                is_width = pair >= T + HEIGHT
            else:
                is_height = (pair % 3 == 1) & (pair < 3 * HEIGHT)
                is_width = (pair % 3 == 2) & (pair < 3 * WIDTH)
            position = tl.where(is_width, width, tl.where(is_height, height, position))
    return position


@triton.jit(do_not_specialize=[*STEPS, *_SIZES, "n_slots", "n_cached"])
def qk_rms_norm_rope_cache_kernel(
    q_ptr,  # [tokens, Q_HEADS, H] bf16/fp16/fp32; strides q_step * UNIT, q_head_step * UNIT, 1
    k_ptr, v_ptr,  # [tokens, K_HEADS, H] dtype of q; strides as q's
    q_out_ptr,  # as q, with strides out_q_step * UNIT, out_q_head_step * UNIT, 1
    q_gamma_ptr, k_gamma_ptr,  # [H] fp32
    cos_sin_ptr,  # [n_positions, 2 * H2] dtype of q or fp32: cosines, sines; row stride
    # cos_sin_step * COS_SIN_UNIT
    positions_ptr,  # [tokens] int32/int64, or three rows of them axis_step apart; None: the row of
    # the token's number
    key_cache_ptr, value_cache_ptr,  # [n_cached / PAGE, PAGE, K_HEADS, H] dtype of q or e4m3;
    # strides block_step, slot_step and cache_head_step, each * CACHE_UNIT, and 1
    slots_ptr,  # [n_slots] int32/int64: where each token goes, of the first tokens
    k_scale_ptr, v_scale_ptr,  # [1] fp32, for a cache of e4m3
    n_rows,  # tokens * (Q_HEADS + 2 * K_HEADS)
    q_step: tl.int64, k_step: tl.int64, v_step: tl.int64, q_head_step: tl.int64,
    k_head_step: tl.int64, v_head_step: tl.int64, out_q_step: tl.int64, out_q_head_step: tl.int64,
    cos_sin_step: tl.int64, n_positions: tl.int64, axis_step: tl.int64, block_step: tl.int64,
    slot_step: tl.int64, cache_head_step: tl.int64, n_slots: tl.int64, n_cached: tl.int64, eps,
    UNIT: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, M: tl.constexpr, PDL: tl.constexpr, IN_PLACE: tl.constexpr,
    COS_SIN_UNIT: tl.constexpr,
    H2: tl.constexpr,  # pairs that are rotated: half of rotary_dim
    NVIDIA: tl.constexpr,  # compiled for NVIDIA: neither ROCm nor the interpreter
    INTERLEAVED: tl.constexpr,  # pairs are neighbours, not halves
    CACHE_UNIT: tl.constexpr, PAGE: tl.constexpr, AXES: tl.constexpr, T: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,  # pairs turned by each position, if not by one
):  # fmt: skip
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    rows = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    exists = rows < n_rows
    live = exists & (cols < H)
    token = (rows // (Q_HEADS + 2 * K_HEADS)).to(tl.int64)
    head = (rows % (Q_HEADS + 2 * K_HEADS)).to(tl.int64)
    is_q = head < Q_HEADS
    is_v = head >= Q_HEADS + K_HEADS
    kv_head = tl.where(is_v, head - (Q_HEADS + K_HEADS), head - Q_HEADS)
    q_at = q_ptr + (token * q_step + head * q_head_step) * UNIT
    k_at = k_ptr + (token * k_step + kv_head * k_head_step) * UNIT
    v_at = v_ptr + (token * v_step + kv_head * v_head_step) * UNIT
    at = tl.where(is_q, q_at + cols, either(is_v, v_at, k_at, cols))
    gamma_at = either(is_q, q_gamma_ptr, k_gamma_ptr, cols)
    if not IN_PLACE:
        q_at = q_out_ptr + (token * out_q_step + head * out_q_head_step) * UNIT
    pair, rotates = turning(BLOCK, H2, INTERLEAVED)
    R.wait_for_previous(PDL)
    slot_at = slots_ptr + token
    slot = tl.load(slot_at, mask=exists & ~is_q & (token < n_slots), other=-1).to(tl.int64)
    normed = exists & ~is_v
    position = _position(
        positions_ptr, axis_step, token, normed, pair, AXES, T, HEIGHT, WIDTH
    )  # fmt: skip
    x = tl.load(at, mask=live, other=0.0)
    gamma = tl.load(gamma_at, mask=live & ~is_v, other=0.0)
    cos, sin = load_turns(
        cos_sin_ptr, position, cos_sin_step, n_positions, pair, rotates & normed, H2, COS_SIN_UNIT
    )
    R.fence(True, PDL)
    out = norm_and_rotate(x, gamma, cos, sin, eps, H, H2, BLOCK, M, INTERLEAVED, NVIDIA)
    # A slot that the cache does not hold is a token's that is not cached: padding, or an error.
    cached = (slot >= 0) & (slot < n_cached)
    offset = slot // PAGE * block_step + slot % PAGE * slot_step + kv_head * cache_head_step
    offset = tl.where(cached, offset, 0) * CACHE_UNIT
    cached_at = either(is_v, value_cache_ptr + offset, key_cache_ptr + offset, cols)
    if k_scale_ptr is None:
        out = tl.where(is_v, x, out.to(dtype))
        tl.store(tl.where(is_q, q_at + cols, cached_at), out, mask=live & (is_q | cached))
    else:
        tl.store(q_at + cols, out.to(dtype), mask=live & is_q)
        scale_at = tl.where(is_v, v_scale_ptr, k_scale_ptr)
        scale = tl.load(scale_at, mask=cached, other=1.0)
        kv = tl.where(is_v, x.to(tl.float32), R.rounded(out, dtype, NVIDIA))
        kv = tl.div_rn(kv, tl.broadcast_to(scale, [M, BLOCK]))
        if not NVIDIA:  # its conversion saturates by itself
            kv = tl.clamp(kv, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(cached_at, kv.to(tl.float8e4nv), mask=live & cached)
