"""Which shape of kernel runs: measured once, never searched for at run time.

Figures from an H200 and an H100 (benchmarks/norms.py times the result). How many warps share a row
fixes the order of its sum, so it depends on the operator and the row alone. Everything that depends
on the number of rows changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from gemma_fold.kernels.rows import EARLY, FIRST, LAST, LATE, WITH_ROWS

# (largest row in bytes, warps), in ascending order. One table for all operators, so that a fused
# operator sums in the order of the operators it replaces and equals them bit for bit.
_WARPS = ((2560, 1), (8192, 4), (16384, 8))
_MOST_WARPS = 16
# Rows at which the programs of one kernel no longer fit on the GPU all at once.
_MANY_ROWS = 512
# Rows up to which every program has an SM to itself, whose L2 traffic it need not share.
_LONE_ROWS = 128
# Size below which a kernel is launch and latency, not bandwidth.
_FEW_BYTES = 90112
# Bytes of all heads up to which a thread takes 16 of them, not 32.
_FEW_HEAD_BYTES = 1 << 20


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
    gamma: int  # FIRST or WITH_ROWS


@cache
def warps_per_row(row_bytes: int) -> int:
    """Warps that share one row of ``row_bytes`` bytes of activations."""
    for limit, warps in _WARPS:
        if row_bytes <= limit:
            return warps
    return _MOST_WARPS


def row_config(operator: str, fp8: bool, row_bytes: int, rows: int) -> RowConfig:
    """The configuration of ``operator`` for ``rows`` rows of ``row_bytes`` bytes."""
    warps = warps_per_row(row_bytes)
    alone = rows <= _LONE_ROWS
    many = rows > _MANY_ROWS
    few = rows * row_bytes <= _FEW_BYTES
    # Rows that miss 16-byte alignment are laid out by how many share a program: one does.
    aligned = row_bytes % 16 == 0
    share = many and aligned and (operator == "rms_norm" or row_bytes <= 1536)
    # Two programs of half the GPU's rows each would be spread unevenly over its SMs.
    pair = not alone and rows <= 2 * _LONE_ROWS and operator == "add_rms_norm" and row_bytes > 8192
    last = operator == "rms_norm_add_rms_norm" and 8192 < row_bytes <= 12288
    if fp8 and rows > 2048 and row_bytes > 2560:
        last = True
    return RowConfig(
        warps=warps,
        together=2 if pair and aligned else max(1, 4 // warps) if share else 1,
        pdl=_signal(fp8, row_bytes, rows),
        fence=not pair and (warps == 1 or not few),
        gamma=FIRST.value if alone else LAST.value if many and last else WITH_ROWS.value,
        store=".cg" if many and operator != "rms_norm" and row_bytes > 2048 else "",
    )


def _signal(fp8: bool, row_bytes: int, rows: int) -> int:
    """When the next kernel may start. A queue of early ones would crowd onto a few SMs."""
    late = row_bytes > 8192 if rows <= _LONE_ROWS else fp8
    if 32 < rows <= _MANY_ROWS and 2560 < row_bytes <= 8192:
        late = True
    return LATE.value if late else EARLY.value


def heads_config(head_bytes: int, heads: int, tokens: int) -> HeadsConfig:
    """The configuration for ``heads`` heads, of all tokens, of ``head_bytes``, a power of two."""
    few = tokens <= _LONE_ROWS and heads * head_bytes <= _FEW_HEAD_BYTES
    # 32 bytes a thread where there are many: enough in flight.
    return HeadsConfig(
        warps=min(16, max(4, head_bytes // 1024)),
        together=max(1, (2048 if few else 4096) // head_bytes),
        gamma=FIRST.value if few else WITH_ROWS.value,
    )
