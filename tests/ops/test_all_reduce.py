"""All-reduce operators where there is no peer memory: Gloo between CPU processes, and one rank."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import patience
import pytest
import torch

from gemma_fold import ops
from gemma_fold.ops.collectives import exchange, tuning
from gemma_fold.ops.collectives.exchange import capacity
from gemma_fold.ops.program import compiled

RANKS = Path(__file__).resolve().parents[1] / "support" / "all_reduce_ranks.py"
SLOW = [pytest.param(world, marks=pytest.mark.slow) for world in (4, 8)]


@pytest.mark.parametrize("world", [2, *SLOW])
def test_ranks_agree_with_the_formula(world: int, tmp_path: Path) -> None:
    ranks = subprocess.run(
        [sys.executable, RANKS, str(world), tmp_path / "store"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=patience.seconds(300),
    )
    assert ranks.returncode == 0, ranks.stdout[-3000:]


@pytest.fixture
def alone() -> Iterator[ops.AllReduceWorkspace]:
    with ops.AllReduceWorkspace(hidden=64) as space:
        yield space


def test_a_group_of_one_reduces_nothing(alone: ops.AllReduceWorkspace) -> None:
    assert alone.world == 1 and "nothing to reduce" in alone.explain()
    x, residual = torch.randn(3, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    gamma, post = torch.randn(64), torch.randn(64)
    total = ops.all_reduce(x, alone)
    assert torch.equal(total, x) and total.data_ptr() != x.data_ptr()
    for got, want in (
        (
            ops.all_reduce_add_rms_norm(x, residual, gamma, alone),
            ops.add_rms_norm(x, residual, gamma),
        ),
        (
            ops.all_reduce_rms_norm_add_rms_norm(x, residual, post, gamma, alone),
            ops.rms_norm_add_rms_norm(x, residual, post, gamma),
        ),
        (
            ops.all_reduce_add_rms_norm_fp8(x, residual, gamma, alone),
            ops.add_rms_norm_fp8(x, residual, gamma),
        ),
        (
            ops.all_reduce_rms_norm_add_rms_norm_fp8(x, residual, post, gamma, alone),
            ops.rms_norm_add_rms_norm_fp8(x, residual, post, gamma),
        ),
    ):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_operators_are_registered_right(alone: ops.AllReduceWorkspace) -> None:
    x, residual = torch.randn(3, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    gamma = torch.randn(64)
    registered = torch.ops.gemma_fold
    add = (x, residual, gamma, 1e-6, alone.name)
    sandwich = (x, residual, gamma, gamma, 1e-6, 1e-6, alone.name)
    for operator, args in (
        (registered.all_reduce, (x, alone.name)),
        (registered.all_reduce_add_rms_norm, add),
        (registered.all_reduce_rms_norm_add_rms_norm, sandwich),
        (registered.all_reduce_add_rms_norm_fp8, (*add, None)),
        (registered.all_reduce_add_rms_norm_fp8, (*add, torch.ones(1))),
        (registered.all_reduce_rms_norm_add_rms_norm_fp8, (*sandwich, None)),
    ):
        torch.library.opcheck(operator, args)


def test_wrong_operands_are_refused(alone: ops.AllReduceWorkspace) -> None:
    x, gamma = torch.ones(2, 64), torch.ones(64)
    with pytest.raises(TypeError, match=r"residual is torch\.float16"):
        ops.all_reduce_add_rms_norm(x, x.half(), gamma, alone)
    with pytest.raises(TypeError, match="gamma must be float32"):
        ops.all_reduce_add_rms_norm(x, x, gamma.half(), alone)
    with pytest.raises(ValueError, match="residual has shape"):
        ops.all_reduce_rms_norm_add_rms_norm(x, x[:1], gamma, gamma, alone)
    with pytest.raises(TypeError, match="must be bfloat16"):
        ops.all_reduce(x.double(), alone)
    with pytest.raises(ValueError, match="no backward"):
        ops.all_reduce(torch.ones(1, 64, requires_grad=True), alone)
    with pytest.raises(ValueError, match="no all-reduce workspace 'elsewhere'"):
        ops.all_reduce(x, "elsewhere")


def test_workspaces_say_what_is_wrong() -> None:
    with ops.AllReduceWorkspace(hidden=64, name="taken"):  # noqa: SIM117
        with pytest.raises(ValueError, match="named 'taken'"):
            ops.AllReduceWorkspace(hidden=64, name="taken")
    with pytest.raises(ValueError, match="path must be"):
        ops.AllReduceWorkspace(hidden=64, path="multicast")
    with pytest.raises(ValueError, match="dtype must be"):
        ops.AllReduceWorkspace(hidden=64, dtype=torch.int8)
    for wrong in ({"hidden": 0}, {"hidden": 20_000}, {"max_tokens": 0}, {"timeout": 0.0}):
        with pytest.raises(ValueError, match="hidden must be"):
            ops.AllReduceWorkspace(**{"hidden": 64, **wrong})


def test_an_error_inside_the_block_frees_the_name() -> None:
    with pytest.raises(KeyError), ops.AllReduceWorkspace(hidden=64, name="once"):
        raise KeyError
    ops.AllReduceWorkspace(hidden=64, name="once").destroy()


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_memory_stays_bounded(world: int) -> None:
    """However many tokens are asked for: a kernel takes so many bytes, and two slots of them."""
    size = capacity(world, 1 << 20, 8192 * 2, tuning.ONE_SHOT_BYTES[world])
    assert size.one_shot_rows * size.pitch <= tuning.ONE_SHOT_KERNEL_BYTES
    assert size.two_shot_rows * size.pitch <= tuning.TWO_SHOT_KERNEL_BYTES
    assert size.bytes <= 4 * (tuning.ONE_SHOT_KERNEL_BYTES + tuning.TWO_SHOT_KERNEL_BYTES)


def test_every_row_is_covered_by_its_threads() -> None:
    for row_bytes in range(16, 32769, 16):
        shape = tuning.shape(row_bytes)
        held = shape.vectors * shape.threads
        assert shape.threads % 32 == 0 and shape.threads <= 1024
        assert held - shape.threads < row_bytes // 16 <= held


@pytest.mark.slow
@pytest.mark.parametrize("many", (False, True))
@pytest.mark.parametrize("fp8", (None, "per_token"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("world", (2, 8))
def test_the_kernel_compiles_for_hopper(
    world: int, dtype: torch.dtype, fp8: str | None, many: bool
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    macros = exchange.defines(world, 5376, dtype, fp8, many)
    assert compiled(exchange.SOURCE, (9, 0), tuple(macros.items()))[:4] == b"\x7fELF"
