"""Which shape of kernel runs: measured once, never searched for at run time.

Figures from H100s (benchmarks/norms.py times the result). How many warps share a row fixes the
order of its sum, so it depends on the row alone. Everything that depends on the number of rows
changes no bit. Programs that keep gamma in registers and take one row after another, with loads
pipelined through shared memory or not, were slower than one program a row wherever tried (1024,
4096 and 16384 rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from gemma_fold.ops.kernels.rows import EARLY, FIRST, LAST, LATE, WITH_ROWS

# (largest row in bytes, warps), in ascending order. One table for all operators, so that a fused
# operator sums in the order of the operators it replaces and equals them bit for bit.
_WARPS = ((2560, 1), (8192, 4), (16384, 8))
_MOST_WARPS = 16
# Rows at which the programs of one kernel no longer fit on the GPU all at once.
_MANY_ROWS = 512
# Rows from which short ones fill the GPU several times over.
_CROWDED_ROWS = 1024
# Rows up to which every program has an SM to itself, whose L2 traffic it need not share.
_LONE_ROWS = 128
# Bytes of all heads above which a program takes twice as many.
_MANY_HEAD_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class RowConfig:
    """How a row kernel runs."""

    warps: int  # that share one row
    together: int  # rows in one program
    pdl: int  # EARLY or LATE
    fence: bool  # all loads are issued before any arithmetic
    gamma: int  # FIRST, WITH_ROWS or LAST
    store: str  # cache modifier of the stores


@dataclass(frozen=True, slots=True)
class HeadsConfig:
    """How a kernel over q and k heads runs."""

    warps: int  # of a program
    together: int  # heads in one program


@cache
def warps_per_row(row_bytes: int) -> int:
    """Warps that share one row of ``row_bytes`` bytes of activations."""
    for limit, warps in _WARPS:
        if row_bytes <= limit:
            return warps
    return _MOST_WARPS


def row_config(operator: str, fp8: bool, row_bytes: int, rows: int) -> RowConfig:
    """The configuration of ``operator`` for ``rows`` rows of ``row_bytes`` bytes."""
    alone = rows <= _LONE_ROWS
    many = rows > _MANY_ROWS
    sandwich = operator == "rms_norm_add_rms_norm" and 8192 < row_bytes <= 12288
    late_gamma = _one_wave(operator, fp8, row_bytes, rows) or (many and sandwich)
    together = _together(operator, fp8, row_bytes, rows)
    only_x = alone and operator == "rms_norm"  # is loaded after the wait
    paired = together > 1 and rows <= 2 * _LONE_ROWS
    return RowConfig(
        warps=warps_per_row(row_bytes),
        together=together,
        pdl=_signal(operator, fp8, row_bytes, rows),
        fence=not (only_x or paired),
        gamma=FIRST.value if alone else LAST.value if late_gamma else WITH_ROWS.value,
        store=".cg" if many and row_bytes > 2048 else "",
    )


def _one_wave(operator: str, fp8: bool, row_bytes: int, rows: int) -> bool:
    """Whether all rows can be on the GPU at once, if only gamma takes no registers meanwhile."""
    add = operator == "add_rms_norm" and not fp8
    return add and 2 * _LONE_ROWS < rows <= 1024 and 5120 < row_bytes <= 8192


def _together(operator: str, fp8: bool, row_bytes: int, rows: int) -> int:
    """Rows in one program."""
    if row_bytes % 16:
        return 1  # rows that miss 16-byte alignment are laid out by how many share a program
    if rows > _CROWDED_ROWS and warps_per_row(row_bytes) == 1:
        if operator == "rms_norm":
            return 2 if fp8 else 4
        return 4 if row_bytes <= 1536 and not fp8 else 1
    # One row a program would leave some SMs a third one and others only their first.
    pair = operator == "add_rms_norm" and row_bytes > 12288
    pair = pair and _LONE_ROWS < rows <= 2 * _LONE_ROWS
    return 2 if pair or _one_wave(operator, fp8, row_bytes, rows) else 1


def _signal(operator: str, fp8: bool, row_bytes: int, rows: int) -> int:
    """When the next kernel may start. A queue of early ones would crowd onto a few SMs."""
    if warps_per_row(row_bytes) == 1:
        sandwich = operator == "rms_norm_add_rms_norm" and rows <= _MANY_ROWS
        late = rows > 64 and (fp8 or sandwich)
    elif rows <= _LONE_ROWS:
        late = row_bytes > 8192 or rows > 16
    elif fp8:
        late = rows <= 2 * _LONE_ROWS and row_bytes <= 8192
    else:
        late = _one_wave(operator, fp8, row_bytes, rows) and rows <= _MANY_ROWS
    signal: int = LATE.value if late else EARLY.value
    return signal


def heads_config(head_bytes: int, heads: int) -> HeadsConfig:
    """The configuration for ``heads`` heads, of all tokens, of ``head_bytes``, a power of two."""
    # 16 bytes a thread; larger programs where there are enough of them.
    warps = 8 if heads * head_bytes > _MANY_HEAD_BYTES else 4
    warps = min(16, max(warps, head_bytes // 512))
    return HeadsConfig(warps=warps, together=max(1, warps * 512 // head_bytes))
