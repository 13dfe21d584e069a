"""The ranks of the CPU tests of the all-reduce: `python all_reduce_ranks.py WORLD STORE`.

Each is a process of its own, forked once torch is imported. It checks everything itself, and the
first that finds something wrong ends them all with an error.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import suppress

import torch
import torch.distributed as dist
from rank_ordered_sum import rank_ordered_sum
from torch import Tensor

from gemma_fold import ops

HIDDEN, EPS = 96, 1e-6


def norm64(x: Tensor, gamma: Tensor) -> Tensor:
    x64 = x.double()
    return x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + EPS) * gamma.double()


def near(got: Tensor, want: Tensor, roundings: int = 2) -> None:
    """Within so many roundings of the dtype: of the sum or residual, and of the result."""
    step = roundings * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=step, atol=step)


def same_on_all_ranks(value: Tensor) -> None:
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert all(torch.equal(other, value) for other in values)


def check_sums(space: ops.AllReduceWorkspace, dtype: torch.dtype) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    random = torch.Generator().manual_seed(rank)
    shared = torch.Generator().manual_seed(99)
    x = torch.randn(5, HIDDEN, generator=random).to(dtype)
    parts: list[Tensor] = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x)
    residual = torch.randn(5, HIDDEN, generator=shared).to(dtype)
    gamma, post = (torch.randn(HIDDEN, generator=shared) for _ in range(2))
    kept = x.clone()

    total = ops.all_reduce(x, space)
    near(total, torch.stack(parts).double().sum(0), roundings=world)
    if world == 2:  # two numbers have one sum in any order
        assert torch.equal(total, rank_ordered_sum(parts))
    assert total.dtype == dtype and torch.equal(x, kept), "the input must stay as it was"

    y, new = ops.all_reduce_add_rms_norm(x, residual, gamma, space, EPS)
    assert torch.equal(new, residual + total)
    near(y, norm64(new, gamma))
    y2, new2 = ops.all_reduce_rms_norm_add_rms_norm(x, residual, post, gamma, space, EPS, EPS)
    near(new2, residual.double() + norm64(total, post).to(dtype).double())
    near(y2, norm64(new2, gamma))
    for value in (total, y, new, y2, new2):
        same_on_all_ranks(value)

    y8, scale, new8 = ops.all_reduce_rms_norm_add_rms_norm_fp8(
        x, residual, post, gamma, space, EPS, EPS
    )
    assert torch.equal(new8, new2) and scale.shape == (5, 1)
    torch.testing.assert_close(y8.float() * scale, y2.float(), rtol=2**-4, atol=float(scale.max()))
    y8, scale, _ = ops.all_reduce_add_rms_norm_fp8(x, residual, gamma, space, EPS)
    torch.testing.assert_close(y8.float() * scale, y.float(), rtol=2**-4, atol=float(scale.max()))


def check_compiled(space: ops.AllReduceWorkspace) -> None:
    name = space.name
    gamma = torch.ones(HIDDEN)

    def layer(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return ops.all_reduce_rms_norm_add_rms_norm(x * 2, residual, gamma, gamma, name)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 7):
        x = torch.full((tokens, HIDDEN), 1.0 + dist.get_rank()).bfloat16()
        residual = torch.arange(HIDDEN).repeat(tokens, 1).bfloat16()
        for got, want in zip(compiled(x, residual), layer(x, residual), strict=True):
            assert torch.equal(got, want)


def check_groups() -> None:
    """Halves of the world reduce among themselves, beside a workspace of everyone."""
    rank, world = dist.get_rank(), dist.get_world_size()
    halves = [
        dist.new_group(list(range(world // 2))),
        dist.new_group(list(range(world // 2, world))),
    ]
    mine = halves[rank >= world // 2]
    everyone = ops.AllReduceWorkspace(hidden=8, name="everyone")
    half = ops.AllReduceWorkspace(mine, hidden=8, name="half")
    one = torch.ones(1, 8)
    assert float(ops.all_reduce(one, everyone)[0, 0]) == world
    assert float(ops.all_reduce(one, "half")[0, 0]) == world // 2
    half.destroy()
    everyone.destroy()


def check_disagreement() -> None:
    rank = dist.get_rank()
    with ops.AllReduceWorkspace(hidden=8, debug=True) as space:
        ops.all_reduce(torch.ones(2, 8), space)
        for x in (
            torch.ones(2 + (rank == 1), 8),
            torch.ones(2, 8).to([torch.float16, torch.float32][rank == 1]),
        ):
            try:
                ops.all_reduce(x, space)
            except ValueError as error:
                assert "disagree" in str(error) and "rank 1: all_reduce" in str(error), error
            else:
                raise AssertionError("ranks that disagree were not noticed")


def run(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    space = ops.AllReduceWorkspace(hidden=HIDDEN, max_tokens=4, name="tp")
    assert not space.fused and space.memory == 0
    assert "because the device is cpu" in space.explain(), space.explain()
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            check_sums(space, dtype)
        check_compiled(space)
        check_groups()
        check_disagreement()
    space.destroy()
    space.destroy()
    try:
        ops.all_reduce(torch.ones(1, HIDDEN), space)
    except ValueError as error:
        assert "was destroyed" in str(error)
    else:
        raise AssertionError("a destroyed workspace was used")
    again = ops.AllReduceWorkspace(hidden=HIDDEN, name="tp")
    again.destroy()
    dist.destroy_process_group()


def forked(rank: int, world: int, store: str) -> int:
    """The process of a rank."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        run(rank, world, store)
        code = 0
    except BaseException:
        print(f"rank {rank}: {traceback.format_exc()}", flush=True)
    finally:
        os._exit(code)


def main() -> None:
    world, store = int(sys.argv[1]), sys.argv[2]
    # What a compiler imports, no rank has to.
    torch.compile(torch.neg, backend="aot_eager")(torch.ones(1))
    left = {forked(rank, world, store): rank for rank in range(world)}
    while left:
        process, status = os.wait()
        rank = left.pop(process)
        if status:
            for other in left:
                with suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
            sys.exit(f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
