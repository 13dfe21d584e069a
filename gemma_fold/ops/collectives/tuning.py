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
# (benchmarks/all_reduce_protocols.py): there the bytes that two-shot saves take as long as its
# second hop, 0.55 microseconds at 400 GB/s. The others are predicted from the same two figures.
_KIB = 1024
ONE_SHOT_BYTES = {
    2: 1 << 62,
    3: 320 * _KIB,
    4: 128 * _KIB,
    5: 90 * _KIB,
    6: 64 * _KIB,
    7: 50 * _KIB,
    8: 41 * _KIB,
}

# Bytes of one rank's rows in one kernel; more rows run as several. One-shot sends all of them
# before it waits for any, so what is in flight should stay in the L2: on two H100s 2048 rows of
# 5376 take a sixth less time this way. Two-shot sends a few rows ahead, and more kernels only cost
# their beginnings and ends; there the limit keeps the buffers small.
ONE_SHOT_KERNEL_BYTES = 512 * 5376 * 2
TWO_SHOT_KERNEL_BYTES = 32 << 20


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
