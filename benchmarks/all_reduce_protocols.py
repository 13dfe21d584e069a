"""Times the two protocols of the fused all-reduce where one overtakes the other.

    torchrun --nproc-per-node 4 benchmarks/all_reduce_protocols.py --out NAME.json

Needs three GPUs or more that reach each other's memory. What it finds is what
`gemma_fold/ops/collectives/tuning.py` says of when a sum takes which.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.distributed as dist
from all_reduce import HIDDEN, OPERATORS, Buffers, measure, ours, ranks_meta
from run_meta import git_commit, result_text

from gemma_fold import ops

TOKENS = (8, 16, 24, 32, 48, 64, 96, 128, 192)
ROUNDS = 7
FORCED = {"one-shot": 1 << 40, "two-shot": 0}  # bytes up to which one-shot is taken


def rows_of(hidden: int) -> list[dict[str, Any]]:
    """Microseconds of both protocols, forced, for rows of one length."""
    spaces = {
        name: ops.AllReduceWorkspace(hidden=hidden, max_tokens=max(TOKENS), one_shot_bytes=most)
        for name, most in FORCED.items()
    }
    found = []
    for tokens in TOKENS:
        b = Buffers(tokens, hidden)
        for op in OPERATORS:
            times = measure({name: ours(op, b, s) for name, s in spaces.items()}, b, ROUNDS)
            shape = {"op": op, "tokens": tokens, "hidden": hidden, "world": dist.get_world_size()}
            found += [
                {**shape, "dtype": "bfloat16", "impl": name, "us": round(us, 3)}
                for name, us in times.items()
            ]
    for space in spaces.values():
        space.destroy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default=git_commit(), help="where .git does not travel along")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch.manual_seed(dist.get_rank())
    rows = [row for hidden in HIDDEN for row in rows_of(hidden)]
    if dist.get_rank() == 0:
        meta = ranks_meta("all_reduce_protocols", args.out, args.commit)
        args.out.write_text(result_text(meta, rows=rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
