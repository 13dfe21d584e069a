"""Which shape of kernel runs: measured once, never searched for at run time.

Figures from an H200 (benchmarks/norms.py times the result). How many warps share a row fixes the
order of its sum, so it depends on the operator and the row alone. Everything that depends on the
number of rows changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from gemma_fold.kernels.rows import EARLY, LATE

# (largest row in bytes, warps), in ascending order. One table for all operators, so that a fused
# operator sums in the order of the operators it replaces and equals them bit for bit.
_WARPS = ((2560, 1), (8192, 4), (16384, 8))
_MOST_WARPS = 16
# Rows at which the programs of one kernel no longer fit on the GPU all at once.
_MANY_ROWS = 512
# Size below which a kernel is launch and latency, not bandwidth.
_FEW_BYTES = 90112


@dataclass(frozen=True, slots=True)
class RowConfig:
    """How a row kernel runs."""

    warps: int  # that share one row
    together: int  # rows in one program
    pdl: int  # EARLY or LATE
    fence: bool  # all loads are issued before any arithmetic
    gamma_late: bool  # the last gamma is loaded when it is needed


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
    many = rows > _MANY_ROWS
    few = rows * row_bytes <= _FEW_BYTES
    # Rows that miss 16-byte alignment are laid out by how many share a program: one does.
    share = many and row_bytes % 16 == 0 and (operator == "rms_norm" or row_bytes <= 1536)
    # Up to here a queue of early kernels would crowd onto a few SMs.
    spread = _MANY_ROWS if row_bytes < 8192 else 128
    late = operator == "rms_norm_add_rms_norm" and 8192 < row_bytes <= 12288
    if fp8 and rows > 2048 and row_bytes > 2560:
        late = True
    return RowConfig(
        warps=warps,
        together=max(1, 4 // warps) if share else 1,
        pdl=LATE.value if row_bytes > 2560 and 32 < rows <= spread else EARLY.value,
        fence=warps == 1 or not few,
        gamma_late=many and late,
    )
