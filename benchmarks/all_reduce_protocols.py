"""Times the two protocols of the fused all-reduce where one overtakes the other.

    torchrun --nproc-per-node 4 -m benchmarks.all_reduce_protocols --out NAME.json

Needs three GPUs or more that reach each other's memory. What it finds is what
`gemma_fold/ops/collectives/tuning.py` says of when a sum takes which.
"""

from __future__ import annotations

import argparse

from benchmarks import run
from benchmarks.all_reduce import (
    BOTH,
    HIDDEN,
    OPERATORS,
    Buffers,
    measure,
    ours,
    ranks,
    rows_of,
    write,
)
from benchmarks.result import Row, Settings
from gemma_fold import ops

TOKENS = (8, 16, 24, 32, 48, 64, 96, 128, 192)
ROUNDS = 7
#: Bytes up to which one-shot is taken.
FORCED = {"one-shot": 1 << 40, "two-shot": 0}
SETTINGS = Settings(
    both=BOTH, ours={name: f"one_shot_bytes={most}" for name, most in FORCED.items()}
)


def times_of(hidden: int) -> list[Row]:
    """Microseconds of both protocols, forced, for rows of one length."""
    spaces = {
        name: ops.AllReduceWorkspace(hidden=hidden, max_tokens=max(TOKENS), one_shot_bytes=most)
        for name, most in FORCED.items()
    }
    rows = []
    for tokens in TOKENS:
        b = Buffers(tokens, hidden)
        for op in OPERATORS:
            found = measure({name: ours(op, b, s) for name, s in spaces.items()}, b, ROUNDS)
            rows += rows_of(op, tokens, hidden, found)
    for space in spaces.values():
        space.destroy()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    run.add_options(parser)
    args = parser.parse_args()
    with ranks() as (rank, _):
        rows = [row for hidden in HIDDEN for row in times_of(hidden)]
        if rank == 0:
            write(args, "all_reduce_protocols", SETTINGS, rows)


if __name__ == "__main__":
    main()
