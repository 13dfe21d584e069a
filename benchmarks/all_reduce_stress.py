"""Runs a million calls of the fused all-reduce, and records how many results differ.

    python -m benchmarks.all_reduce_stress --world 4 --out NAME.json

What runs is `tests/gpu/all_reduce_worker.py stress`, one process for each GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

from benchmarks import run
from benchmarks.result import OURS, Row, Settings

WORKER = run.ROOT / "tests" / "gpu" / "all_reduce_worker.py"
MEASURES = {
    "calls": "in eager mode and in graphs, each compared with the rank-ordered fp32 sum",
    "different": "results that are not that sum, bit for bit",
    "seconds": "of all calls",
}


def of_all_ranks(world: int, *command: str) -> list[str]:
    """The command that runs another in `world` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    return [*launcher, f"--nproc-per-node={world}", *command]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=2, help="ranks")
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--hidden", type=int, default=5376)
    run.add_options(parser)
    args = parser.parse_args()
    sizes = [f"--calls={args.calls}", f"--hidden={args.hidden}"]
    command = of_all_ranks(args.world, sys.executable, str(WORKER), "stress", *sizes)
    environment = {**os.environ, "PYTHONPATH": str(run.ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode or not lines:
        return 1
    found = json.loads(lines[-1])
    run.write(
        args,
        "all_reduce_stress",
        machine=run.gpus(args.world),
        versions=run.versions("torch", "triton"),
        settings=Settings(),
        measures=MEASURES,
        rows=[Row({"hidden": found["hidden"]}, OURS, {name: found[name] for name in MEASURES})],
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
