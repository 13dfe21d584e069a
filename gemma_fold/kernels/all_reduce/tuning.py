"""Thresholds and launch shapes of the fused all-reduce, one table.

They must be the same on all ranks: nothing here is searched for at run time. No entry changes a
result's bits, but for `threads`, which depends on the row alone.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_WORLD = 8
VECTOR_BYTES = 16
_MOST_THREADS = 1024

# Bytes of one rank's rows up to which every rank sends them to every other (one-shot); beyond,
# each row is summed by one rank and the sum is sent on (two-shot). With two ranks both move the
# same bytes, and one-shot needs one hop less. That of four is measured
# (benchmarks/all_reduce_protocols.py); the others are predicted from the bytes that each protocol
# moves over a link of 400 GB/s and a hop of 2 microseconds, which gave 512 KiB for four.
_KIB = 1024
ONE_SHOT_BYTES = {
    2: 1 << 62,
    3: 1024 * _KIB,
    4: 768 * _KIB,
    5: 256 * _KIB,
    6: 256 * _KIB,
    7: 192 * _KIB,
    8: 160 * _KIB,
}


# Bytes of one rank's rows in one kernel; more rows run as several. What is in flight then stays in
# the L2, and the buffers stay small: on H100s 2048 rows of 5376 take a sixth less time this way.
KERNEL_BYTES = 512 * 5376 * 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Threads of a block, and the 16-byte vectors of a row that each of them holds."""

    threads: int
    vectors: int


def shape(row_bytes: int) -> Shape:
    """The launch shape for rows of ``row_bytes``, a multiple of 16 up to 32 KiB."""
    vectors = row_bytes // VECTOR_BYTES
    each = -(-vectors // _MOST_THREADS)
    warps = -(-vectors // (32 * each))
    return Shape(warps * 32, each)


def blocks_per_sm(threads: int) -> int:
    """Blocks that share an SM where there are more rows than SMs."""
    return max(1, 1408 // threads)
