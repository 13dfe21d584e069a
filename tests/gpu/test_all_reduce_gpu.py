"""The fused all-reduce between the GPUs of this machine. Run with ``-m gpu``.

`all_reduce_worker.py` does the work, one process for each GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip(
        f"needs two CUDA GPUs; this machine has {torch.cuda.device_count()}",
        allow_module_level=True,
    )

pytestmark = pytest.mark.gpu
WORKER = Path(__file__).with_name("all_reduce_worker.py")
WORLDS = [world for world in (2, 4, 8) if world <= torch.cuda.device_count()]


def run(world: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, f"--nproc-per-node={world}", str(WORKER), *arguments],
        capture_output=True,
        text=True,
        timeout=900,
    )


def found(world: int, *arguments: str) -> Any:
    """The result line of rank 0."""
    done = run(world, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{")))


@pytest.mark.parametrize("world", WORLDS)
def test_every_shape_has_the_bits_of_the_rank_ordered_sum(world: int) -> None:
    assert found(world, "grid", "--quick")["cases"] > 100


@pytest.mark.parametrize("world", WORLDS)
def test_many_calls_in_graphs_and_eager_never_differ(world: int) -> None:
    result = found(world, "stress", "--calls", "50000")
    assert result["calls"] >= 50_000 and result["different"] == 0


def test_a_rank_that_never_calls_is_named_and_ends_the_wait() -> None:
    done = run(2, "stuck")
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "stopped after" in said, said[-4000:]
    assert "no data from rank 1 in time" in said, said[-4000:]
