"""The one-shot protocol of ``kernel.cu`` in Triton, for where NVRTC is not at hand.

The same buffer, slots and uses; the word that means "nothing arrived yet" is as wide as an element
here, which what is sent to either kernel satisfies. A row is polled by all of its program at once,
so every poll ends in a barrier of the program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma_fold.ops.kernels import rows as R

EMPTY: tl.constexpr = tl.constexpr(-1)


@triton.jit
def _buffer(peers_ptr, rank: tl.constexpr, word: tl.constexpr):
    """The buffer of `rank`, mapped here; aligned to more than 16 bytes."""
    return tl.multiple_of(tl.load(peers_ptr + rank).to(tl.pointer_type(word)), 16)


@triton.jit
def _place(
    peers_ptr,
    owner: tl.constexpr,
    sender: tl.constexpr,
    slot,
    row,
    capacity,
    PITCH: tl.constexpr,
    WORLD: tl.constexpr,
    word: tl.constexpr,
):
    """Where `sender` puts its `row` in the buffer of `owner`, which keeps no place for itself."""
    place: tl.constexpr = sender if sender < owner else sender - 1
    at = ((slot * (WORLD - 1) + place) * capacity + row) * PITCH
    return _buffer(peers_ptr, owner, word) + at


@triton.jit
def _norm(x, gamma, eps, H: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """RMSNorm of one row ``x`` [BLOCK], rounded once to ``dtype``."""
    row = (x[None, :],)
    normed = R.scale(row, R.inverse_rms(row, eps, H), (gamma[None, :],), dtype)
    return tl.reshape(normed[0], [BLOCK])


@triton.jit(do_not_specialize=["n_rows", "capacity", "x_step", "residual_step", "most_polls"])
def one_shot_kernel(
    peers_ptr,  # [WORLD] int64: every rank's buffer of [slot 2][WORLD - 1][capacity] rows
    x_ptr,  # [n_rows, H] integers as wide as the elements, row stride x_step * UNIT
    residual_ptr,  # [n_rows, H] of y's dtype, row stride residual_step * UNIT; None for the sum
    post_gamma_ptr,  # [H] fp32; None without a post-norm
    pre_gamma_ptr,  # [H] fp32; None for the sum alone
    y_ptr,  # [n_rows, H] dtype of the activations; contiguous
    total_ptr,  # [n_rows, H]: the new residual; contiguous; None for the sum alone
    uses_ptr,  # [capacity] int32
    n_rows,
    capacity: tl.int64,
    x_step: tl.int64,
    residual_step: tl.int64,
    most_polls,
    post_eps,
    pre_eps,
    UNIT: tl.constexpr,  # elements in 16 bytes
    PITCH: tl.constexpr,  # elements from one row of a buffer to the next
    WORLD: tl.constexpr,
    RANK: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= H
    PDL: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    live = cols < H
    word: tl.constexpr = x_ptr.dtype.element_ty
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    other_nan: tl.constexpr = 0x7FFF if word == tl.int16 else 0x7FFF7FFF
    R.wait_for_previous(PDL)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        slot = tl.load(uses_ptr + row, volatile=True) & 1
        x = tl.load(x_ptr + row * (x_step * UNIT) + cols, mask=live, other=0)
        x = tl.where(x == EMPTY, tl.full([BLOCK], other_nan, word), x)
        for k in tl.static_range(1, WORLD):
            to = _place(
                peers_ptr, (RANK + k) % WORLD, RANK, slot, row, capacity, PITCH, WORLD, word
            )
            tl.store(to + cols, x, mask=live)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        slot = tl.load(uses_ptr + row, volatile=True) & 1
        total = tl.zeros([BLOCK], tl.float32)
        for r in tl.static_range(WORLD):
            if r == RANK:
                part = tl.load(x_ptr + row * (x_step * UNIT) + cols, mask=live, other=0)
            else:
                at = _place(peers_ptr, RANK, r, slot, row, capacity, PITCH, WORLD, word) + cols
                part = tl.load(at, mask=live, other=0, volatile=True)
                missing = tl.sum((part == EMPTY).to(tl.int32))
                polls = most_polls
                while (missing > 0) & (polls > 0):
                    part = tl.load(at, mask=live, other=0, volatile=True)
                    missing = tl.sum((part == EMPTY).to(tl.int32))
                    polls -= 1
                tl.device_assert(missing == 0, "gemma_fold all-reduce: no data from a rank in time")
                tl.store(at, tl.full([BLOCK], EMPTY, word), mask=live)
            value = part.to(dtype, bitcast=True).to(tl.float32)
            total = value if r == 0 else total + value
        summed = total.to(dtype)
        if pre_gamma_ptr is None:
            tl.store(y_ptr + row.to(tl.int64) * H + cols, summed, mask=live)
        else:
            if post_gamma_ptr is not None:
                post_gamma = tl.load(post_gamma_ptr + cols, mask=live, other=0.0)
                summed = _norm(summed, post_gamma, post_eps, H, BLOCK, dtype)
            residual = tl.load(
                residual_ptr + row * (residual_step * UNIT) + cols, mask=live, other=0.0
            )
            new = (residual.to(tl.float32) + summed.to(tl.float32)).to(dtype)
            tl.store(total_ptr + row.to(tl.int64) * H + cols, new, mask=live)
            pre_gamma = tl.load(pre_gamma_ptr + cols, mask=live, other=0.0)
            y = _norm(new, pre_gamma, pre_eps, H, BLOCK, dtype)
            tl.store(y_ptr + row.to(tl.int64) * H + cols, y, mask=live)
        tl.debug_barrier()  # all threads have read the slot
        tl.store(uses_ptr + row, slot + 1)
