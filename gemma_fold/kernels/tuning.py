"""Which shape of kernel runs: measured once, never searched for at run time.

Figures from an H200 (benchmarks/norms.py times the result). How many warps share a row fixes the
order of its sum, so it depends on the operator and the row alone. Everything that depends on the
number of rows changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from gemma_fold.kernels.rows import EARLY, LATE

# Per operator: (largest row in bytes, warps), in ascending order.
_WARPS = {
    "rms_norm": ((2560, 1), (7680, 4), (16384, 8)),
    "add_rms_norm": ((1536, 2), (8192, 4), (12288, 8)),
    "rms_norm_add_rms_norm": ((1536, 1), (2560, 2), (8192, 4), (16384, 8)),
}
_MOST_WARPS = 16
# Rows at which the programs of one kernel no longer fit on the GPU all at once.
_MANY_ROWS = 512
# Elements below which a kernel is launch and latency, not bandwidth.
_FEW_ELEMENTS = 45056


@dataclass(frozen=True, slots=True)
class RowConfig:
    """How a row kernel runs."""

    warps: int  # that share one row
    together: int  # rows in one program
    pdl: int  # EARLY or LATE
    fence: bool  # all loads are issued before any arithmetic
    gamma_late: bool  # the last gamma is loaded when it is needed


@cache
def warps_per_row(operator: str, row_bytes: int) -> int:
    """Warps that share one row of ``row_bytes`` bytes of activations."""
    for limit, warps in _WARPS[operator]:
        if row_bytes <= limit:
            return warps
    return _MOST_WARPS


def row_config(operator: str, row_bytes: int, rows: int, elements: int) -> RowConfig:
    """The configuration for ``rows`` rows, ``elements`` elements in all."""
    warps = warps_per_row(operator, row_bytes)
    many = rows > _MANY_ROWS
    few = elements <= _FEW_ELEMENTS
    return RowConfig(
        warps=warps,
        together=max(1, 4 // warps) if many else 1,
        pdl=LATE.value if row_bytes > 2560 and not (many or few) else EARLY.value,
        fence=warps == 1 or not few,
        # Rows of this length then leave registers for one more program on each SM.
        gamma_late=many and operator == "rms_norm_add_rms_norm" and 8192 < row_bytes <= 12288,
    )
