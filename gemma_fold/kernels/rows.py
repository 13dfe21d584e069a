"""Pieces every norm kernel is made of: load, reduce, round, quantise and store rows.

A program holds ``M`` rows of ``H`` elements as a tuple of ``[M, CHUNK]`` pieces, the last one
masked. Rows are not padded to a power of two: 5376 columns are three pieces of 2048, not 8192.
With ``CHUNK`` = (warps per row) * 32 * (elements in 16 bytes) and ``M * warps per row`` warps, each
row belongs to its own warps, every access is 16 bytes a thread, and a row is reduced in the same
order whatever ``M`` is: its bits do not depend on how many rows there are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(ptr, offsets, live, H: tl.constexpr, CHUNK: tl.constexpr, M: tl.constexpr):
    """Rows at ``ptr + offsets`` (offsets: [M, 1]) as pieces; columns past H read as zero."""
    cols = tl.arange(0, CHUNK)[None, :]
    pieces = ()
    for i in tl.static_range((H + CHUNK - 1) // CHUNK):
        at = ptr + offsets + (cols + i * CHUNK)
        if (i + 1) * CHUNK > H:
            piece = tl.load(at, mask=live & (cols + i * CHUNK < H), other=0.0)
        elif M > 1:
            piece = tl.load(at, mask=live, other=0.0)
        else:
            piece = tl.load(at)
        pieces = pieces + (piece,)
    return pieces


@triton.jit
def store(ptr, offsets, live, pieces, H: tl.constexpr, CHUNK: tl.constexpr, M: tl.constexpr):
    """Writes pieces to rows at ``ptr + offsets`` in the dtype of ``ptr``."""
    cols = tl.arange(0, CHUNK)[None, :]
    for i in tl.static_range((H + CHUNK - 1) // CHUNK):
        at = ptr + offsets + (cols + i * CHUNK)
        value = pieces[i].to(ptr.dtype.element_ty)
        if (i + 1) * CHUNK > H:
            tl.store(at, value, mask=live & (cols + i * CHUNK < H))
        elif M > 1:
            tl.store(at, value, mask=live)
        else:
            tl.store(at, value)


@triton.jit
def normalize(pieces, gammas, eps, dtype: tl.constexpr, H: tl.constexpr):
    """RMSNorm of each row, computed in fp32 and rounded once to ``dtype``."""
    squares = pieces[0].to(tl.float32) * pieces[0].to(tl.float32)
    for i in tl.static_range(1, len(pieces)):
        x = pieces[i].to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / H + eps)
    normed = ()
    for i in tl.static_range(len(pieces)):
        normed = normed + ((pieces[i].to(tl.float32) * rstd * gammas[i]).to(dtype),)
    return normed


@triton.jit
def add(residuals, pieces, dtype: tl.constexpr):
    """The residual add, rounded to ``dtype`` as the unfused add rounds."""
    total = ()
    for i in tl.static_range(len(pieces)):
        sum32 = residuals[i].to(tl.float32) + pieces[i].to(tl.float32)
        total = total + (sum32.to(dtype),)
    return total


@triton.jit
def _larger(a, b):
    # The plain maximum drops NaN; a row with a NaN must get a NaN scale, as the reference does.
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize(pieces, scale_ptr, rows, live, PER_TOKEN: tl.constexpr):
    """e4m3 of each row over its scale, saturating. ``scale_ptr``: fp32, [1] in or [rows] out."""
    if PER_TOKEN:
        top = tl.abs(pieces[0].to(tl.float32))
        for i in tl.static_range(1, len(pieces)):
            top = _larger(top, tl.abs(pieces[i].to(tl.float32)))
        top = tl.reduce(top, 1, _larger, keep_dims=True)
        scale = _larger(tl.div_rn(top, 448.0), 1.0 / (448.0 * 512.0))
        tl.store(scale_ptr + rows, scale, mask=live)
    else:
        scale = tl.load(scale_ptr)
    inverse = tl.div_rn(1.0, scale)
    quantized = ()
    for i in tl.static_range(len(pieces)):
        value = pieces[i].to(tl.float32) * inverse
        value = tl.clamp(value, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        quantized = quantized + (value.to(tl.float8e4nv),)
    return quantized
