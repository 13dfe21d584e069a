"""Pieces every norm kernel is made of: load, reduce, round, quantise and store rows.

A program holds ``M`` rows of ``H`` elements as a tuple of ``[M, CHUNK]`` pieces, the last one
masked. Rows are not padded to a power of two: 5376 columns are three pieces of 2048, not 8192.
With ``CHUNK`` = (warps per row) * 32 * (elements in 16 bytes) and ``M * warps per row`` warps, each
row belongs to its own warps, every access is 16 bytes a thread, and a row is reduced in the same
order whatever ``M`` is: its bits do not depend on how many rows there are.

The other constants of kernels over rows: a step of a stride is ``UNIT`` elements; ``PER_TOKEN``
scales are written, not read; ``NVIDIA`` is neither ROCm nor the interpreter; ``PDL``, ``FENCE`` and
``GAMMA`` are explained below; ``STORE`` is the cache modifier of the stores.
"""

# ruff: noqa: RUF005  (Triton's language has tuple addition, not unpacking)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# How a kernel takes part in programmatic dependent launch (PDL).
NO_PDL: tl.constexpr = tl.constexpr(0)
EARLY: tl.constexpr = tl.constexpr(1)
LATE: tl.constexpr = tl.constexpr(2)
AT_END: tl.constexpr = tl.constexpr(3)

# When gamma is read: before the wait for the previous kernel, with the rows, or when it is needed.
FIRST: tl.constexpr = tl.constexpr(0)
WITH_ROWS: tl.constexpr = tl.constexpr(1)
LAST: tl.constexpr = tl.constexpr(2)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Waits until everything launched before is complete and visible; lets the next kernel start.

    The next kernel waits here in turn, so it may be placed at any time. EARLY places it at once,
    which hides most of its launch. LATE places it when this kernel's own wait is over: kernels then
    queue up one deep, not many deep, and keep their programs spread over the GPU. AT_END places it
    when this kernel is done. That is for what may be writing a gamma, which the next kernel may
    read before it waits: kernels with fp32 outputs. torch's kernels signal at their end, too.
    """
    if PDL == EARLY:
        gdc_launch_dependents()
    if PDL != NO_PDL:
        gdc_wait()
    if PDL == LATE:
        gdc_launch_dependents()


@triton.jit
def fence(FENCE: tl.constexpr, PDL: tl.constexpr):
    """Keeps the compiler from starting to compute before the last load above is issued.

    Signalling the next kernel again changes nothing, and no instruction moves across it.
    """
    if FENCE and PDL != NO_PDL and PDL != AT_END:
        gdc_launch_dependents()


@triton.jit
def numbered(n_rows, M: tl.constexpr):
    """The rows of this program [M, 1], which of them exist, and their numbers as int64."""
    rows = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    return rows, rows < n_rows, rows.to(tl.int64)


@triton.jit
def load(
    ptr, offsets, live, H: tl.constexpr, CHUNK: tl.constexpr, M: tl.constexpr, CACHE: tl.constexpr
):
    """Rows at ``ptr + offsets`` (offsets: [M, 1]) as pieces; columns past H read as zero."""
    cols = tl.arange(0, CHUNK)[None, :]
    pieces = ()
    for i in tl.static_range((H + CHUNK - 1) // CHUNK):
        at = ptr + offsets + (cols + i * CHUNK)
        if (i + 1) * CHUNK > H:
            inside = live & (cols + i * CHUNK < H)
            piece = tl.load(at, mask=inside, other=0.0, cache_modifier=CACHE)
        elif M > 1:
            piece = tl.load(at, mask=live, other=0.0, cache_modifier=CACHE)
        else:
            piece = tl.load(at, cache_modifier=CACHE)
        pieces = pieces + (piece,)
    return pieces


@triton.jit
def load_gamma(
    WHEN: tl.constexpr, gamma, ptr, rows, live, H: tl.constexpr, CHUNK: tl.constexpr,
    M: tl.constexpr, GAMMA: tl.constexpr,
):  # fmt: skip
    """Gamma as pieces [M, CHUNK] where GAMMA says to read it now, at WHEN; else ``gamma``.

    Read FIRST it comes from the L2: the L1 may hold an old one.
    """
    if GAMMA == WHEN:
        CACHE: tl.constexpr = ".cg" if GAMMA == FIRST else ""
        gamma = load(ptr, tl.zeros_like(rows), live, H, CHUNK, M, CACHE)
    return gamma


@triton.jit
def plus_one(pieces):
    """Zero-centred weights as gammas: 1 + w in fp32, in registers."""
    gammas = ()
    for i in tl.static_range(len(pieces)):
        gammas = gammas + (pieces[i].to(tl.float32) + 1.0,)
    return gammas


@triton.jit
def store(
    ptr, offsets, live, pieces, H: tl.constexpr, CHUNK: tl.constexpr, M: tl.constexpr, CACHE:
    tl.constexpr,
):  # fmt: skip
    """Writes pieces to rows at ``ptr + offsets`` in the dtype of ``ptr``."""
    cols = tl.arange(0, CHUNK)[None, :]
    for i in tl.static_range((H + CHUNK - 1) // CHUNK):
        at = ptr + offsets + (cols + i * CHUNK)
        value = pieces[i].to(ptr.dtype.element_ty)
        if (i + 1) * CHUNK > H:
            tl.store(at, value, mask=live & (cols + i * CHUNK < H), cache_modifier=CACHE)
        elif M > 1:
            tl.store(at, value, mask=live, cache_modifier=CACHE)
        else:
            tl.store(at, value, cache_modifier=CACHE)


@triton.jit
def rounded(x, dtype: tl.constexpr, NVIDIA: tl.constexpr):
    """fp32 ``x`` rounded to the nearest ``dtype``, as fp32.

    Written out for NVIDIA: a cast there and back compiles to one-element conversions, which run
    at a quarter of the rate of the two-element ones and would bound these kernels.
    """
    if dtype == tl.float32:
        y = x
    elif not NVIDIA:
        y = x.to(dtype).to(tl.float32)
    elif dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            "{.reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2;"
            " shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000;}",
            "=f,=f,f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        y = tl.inline_asm_elementwise(
            "{.reg .b32 t; .reg .f16 lo, hi; cvt.rn.f16x2.f32 t, $3, $2; mov.b32 {lo, hi}, t;"
            " cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi;}",
            "=f,=f,f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return y


@triton.jit
def inverse_rms(pieces, eps, H: tl.constexpr):
    """1 / rms of each row, fp32 [M, 1]. For fp32 rows the last bit of it counts."""
    squares = pieces[0].to(tl.float32) * pieces[0].to(tl.float32)
    for i in tl.static_range(1, len(pieces)):
        x = pieces[i].to(tl.float32)
        squares += x * x
    total = tl.sum(squares, axis=1, keep_dims=True)
    if pieces[0].dtype == tl.float32:
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(total, H * 1.0) + eps))
    else:
        rstd = tl.rsqrt(total / H + eps)
    return rstd


@triton.jit
def scale(pieces, rstd, gammas, dtype: tl.constexpr):
    """``(x * rstd) * gamma`` in fp32, rounded once to ``dtype``."""
    normed = ()
    for i in tl.static_range(len(pieces)):
        normed = normed + ((pieces[i].to(tl.float32) * rstd * gammas[i]).to(dtype),)
    return normed


@triton.jit
def add(residuals, pieces):
    """The residual add, rounded to the dtype of both as the unfused add rounds."""
    total = ()
    for i in tl.static_range(len(pieces)):
        sum32 = residuals[i].to(tl.float32) + pieces[i].to(tl.float32)
        total = total + (sum32.to(residuals[0].dtype),)
    return total


@triton.jit
def _larger(a, b):
    # The plain maximum drops NaN; a row with a NaN must get a NaN scale, as the reference does.
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize(
    normed, scale_ptr, rows, live, dtype: tl.constexpr, PER_TOKEN: tl.constexpr, NVIDIA:
    tl.constexpr,
):  # fmt: skip
    """e4m3 of each fp32 row, rounded to ``dtype`` first, over its scale; saturating.

    ``scale_ptr``: fp32, [1] read or [rows] written.

    NVIDIA's conversion saturates by itself; elsewhere values are clamped first.
    """
    pieces = ()
    for i in tl.static_range(len(normed)):
        pieces = pieces + (rounded(normed[i], dtype, NVIDIA),)
    if PER_TOKEN:
        top = tl.abs(pieces[0])
        for i in tl.static_range(1, len(pieces)):
            top = _larger(top, tl.abs(pieces[i]))
        top = tl.reduce(top, 1, _larger, keep_dims=True)
        scale = _larger(tl.div_rn(top, 448.0), 1.0 / (448.0 * 512.0))
        tl.store(scale_ptr + rows, scale, mask=live)
    else:
        scale = tl.load(scale_ptr)
    inverse = tl.div_rn(1.0, scale)
    quantized = ()
    for i in tl.static_range(len(pieces)):
        value = pieces[i] * inverse
        if not NVIDIA:
            value = tl.clamp(value, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        quantized = quantized + (value.to(tl.float8e4nv),)
    return quantized


@triton.jit
def finish(
    y_ptr, total_ptr, scale_ptr, rows, live, pieces, eps, gamma_ptr, gamma, H: tl.constexpr,
    CHUNK: tl.constexpr, M: tl.constexpr, PER_TOKEN: tl.constexpr, NVIDIA: tl.constexpr,
    GAMMA: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Writes the norm of ``pieces``, in their dtype or, where there is a ``scale_ptr``, as e4m3.

    Writes them, too, where there is a ``total_ptr``.
    """
    wide = rows.to(tl.int64)
    if total_ptr is not None:
        store(total_ptr, wide * H, live, pieces, H, CHUNK, M, STORE)
    rstd = inverse_rms(pieces, eps, H)
    gamma = load_gamma(LAST, gamma, gamma_ptr, rows, live, H, CHUNK, M, GAMMA)
    y = scale(pieces, rstd, gamma, tl.float32)  # rounded by the store or by the quantisation
    if scale_ptr is not None:
        y = quantize(y, scale_ptr, rows, live, pieces[0].dtype, PER_TOKEN, NVIDIA)
    store(y_ptr, wide * H, live, y, H, CHUNK, M, STORE)
