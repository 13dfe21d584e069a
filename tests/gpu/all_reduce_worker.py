"""One rank of the GPU tests of the all-reduce; run under torchrun.

    torchrun --nproc-per-node 2 tests/gpu/all_reduce_worker.py {grid,stress,short,stuck}

`grid`: shapes, dtypes, strides, protocols. `stress`: many calls of changing size, in graphs and
eager, on two workspaces, ranks delayed at random. `short`: little of everything, for compute
sanitizers. `stuck`: the last rank never calls. Prints one JSON line on rank 0; any difference of a
bit ends it with an error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "support"), str(HERE)]

import all_reduce_oracle as oracle  # noqa: E402
import reference  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from gemma_fold import ops  # noqa: E402

POST_EPS, PRE_EPS = 1e-6, 1e-5
QUICK = (640, 5376)
HIDDEN = (64, 640, 1152, 2560, 3840, 4096, 5376, 8192, 16384)
TOKENS = (1, 2, 3, 7, 16, 64, 131, 300, 700)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def meeting_place() -> str:
    """Where the ranks bring tensors together: sanitizers object to what NCCL's kernels do."""
    return "cpu" if dist.get_backend() == "gloo" else "cuda"


def gathered(x: Tensor) -> list[Tensor]:
    words = x.contiguous().view(torch.uint8).to(meeting_place())
    parts = [torch.empty_like(words) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, words)
    return [part.cuda().view(x.dtype) for part in parts]


def shared(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, the same on all ranks."""
    value = torch.randn(*shape, device=meeting_place())
    dist.broadcast(value, 0)
    return value.cuda().to(dtype)


def quantized(y: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """On the CPU, which divides by a Python number instead of multiplying by its reciprocal."""
    values, scales = reference.quantize(y.cpu(), None if scale is None else scale.cpu())
    return values.cuda(), scales.cuda()


def check_rows(space: ops.AllReduceWorkspace, x: Tensor, residual: Tensor) -> None:
    """All operators on these rows, against the oracle and against the other ranks."""
    hidden = x.shape[-1]
    post, pre = shared(hidden), shared(hidden)
    parts = gathered(x)
    assert same(ops.all_reduce(x, space), oracle.rank_ordered_sum(parts)), "all_reduce"
    y, total = ops.all_reduce_add_rms_norm(x, residual, pre, space, PRE_EPS)
    y_want, total_want = oracle.add_norm(parts, residual, pre, PRE_EPS)
    assert same(total, total_want), "add: residual"
    assert same(y, y_want), "add: norm"
    y, total = ops.all_reduce_rms_norm_add_rms_norm(
        x, residual, post, pre, space, POST_EPS, PRE_EPS
    )
    y_want, total_want = oracle.norm_add_norm(parts, residual, post, pre, POST_EPS, PRE_EPS)
    assert same(total, total_want), "sandwich: residual"
    assert same(y, y_want), "sandwich: norm"
    if x.dtype == torch.float32 or torch.cuda.get_device_capability() < (8, 9):
        return
    static = torch.tensor([0.02], device="cuda")
    for scale in (None, static):
        y8, scales, total = ops.all_reduce_rms_norm_add_rms_norm_fp8(
            x, residual, post, pre, space, POST_EPS, PRE_EPS, scale
        )
        want, scales_want = quantized(y_want, scale)
        assert same(total, total_want), "fp8: residual"
        assert same(scales, scales_want), "fp8: scale"
        assert same(y8, want), "fp8: values"
        y8, scales, _ = ops.all_reduce_add_rms_norm_fp8(x, residual, pre, space, PRE_EPS, scale)
        want, scales_want = quantized(oracle.add_norm(parts, residual, pre, PRE_EPS)[0], scale)
        assert same(y8, want) and same(scales, scales_want), "add fp8"


def check_portable(space: ops.AllReduceWorkspace, x: Tensor) -> None:
    """The Triton kernel: the same sums; norms, summed in another order, within an ulp or two."""
    residual = shared(*x.shape, dtype=x.dtype)
    post, pre = shared(x.shape[-1]), shared(x.shape[-1])
    parts = gathered(x)
    assert same(ops.all_reduce(x, space), oracle.rank_ordered_sum(parts)), "portable all_reduce"
    got = ops.all_reduce_add_rms_norm(x, residual, pre, space, PRE_EPS)
    want = oracle.add_norm(parts, residual, pre, PRE_EPS)
    assert same(got[1], want[1]), "portable add: residual"
    torch.testing.assert_close(got[0], want[0], rtol=2**-7, atol=1e-6)
    got = ops.all_reduce_rms_norm_add_rms_norm(x, residual, post, pre, space, POST_EPS, PRE_EPS)
    want = oracle.norm_add_norm(parts, residual, post, pre, POST_EPS, PRE_EPS)
    torch.testing.assert_close(got[1], want[1], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(got[0], want[0], rtol=2**-6, atol=2**-6)


def grid(args: argparse.Namespace) -> dict[str, Any]:
    cases = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for hidden in QUICK if args.quick else HIDDEN:
            if hidden * dtype.itemsize > 32768:
                continue
            # One-shot for up to 16 rows, two-shot beyond, several kernels past 500 rows.
            for one_shot in (None, 16 * hidden * dtype.itemsize):
                with ops.AllReduceWorkspace(
                    hidden=hidden, max_tokens=500, dtype=dtype, one_shot_bytes=one_shot
                ) as space:
                    assert space.fused, space.explain()
                    for tokens in TOKENS:
                        x = torch.randn(tokens, hidden + 64, device="cuda").to(dtype)[:, :hidden]
                        residual = shared(tokens, hidden, dtype=dtype)
                        check_rows(space, x, residual)
                        cases += 1
    for hidden in QUICK:
        with ops.AllReduceWorkspace(hidden=hidden, max_tokens=500, path="portable") as space:
            for tokens in TOKENS:
                check_portable(space, torch.randn(tokens, hidden, device="cuda").bfloat16())
    with ops.AllReduceWorkspace(hidden=5376, max_tokens=64) as space:
        # Shorter rows, other dtypes, no rows, values that are special.
        for hidden, dtype in ((640, torch.bfloat16), (2688, torch.float32), (100, torch.float32)):
            x = torch.randn(5, hidden, device="cuda").to(dtype)
            check_rows(space, x, shared(5, hidden, dtype=dtype))
        assert ops.all_reduce(torch.empty(0, 5376, device="cuda").bfloat16(), space).shape[0] == 0
        x = torch.zeros(4, 5376, device="cuda", dtype=torch.bfloat16)
        x[0], x[1, ::7], x[2, 5] = -0.0, float("inf"), float("nan")
        x[3].view(torch.int16).fill_(-1)  # the bits that mean "nothing arrived yet"
        y = ops.all_reduce(x, space)
        want = oracle.rank_ordered_sum(gathered(x))
        assert same(y[:2], want[:2]) and torch.equal(y.isnan(), want.isnan())
        # Rows that are no whole vectors go to the library.
        x = torch.randn(3, 1003, device="cuda").bfloat16()
        y = ops.all_reduce(x, space)
        torch.testing.assert_close(y, oracle.rank_ordered_sum(gathered(x)))
        compiled = torch.compile(
            lambda x, r, g: ops.all_reduce_add_rms_norm(x, r, g, space.name), fullgraph=True
        )
        x, r, g = torch.randn(9, 5376, device="cuda").bfloat16(), shared(9, 5376), shared(5376)
        r = r.bfloat16()
        for a, b in zip(
            compiled(x, r, g), ops.all_reduce_add_rms_norm(x, r, g, space), strict=True
        ):
            assert same(a, b)
    return {"cases": cases}


class Plan:
    """Calls with their inputs and what they must give; the same on all ranks but for the delays."""

    def __init__(self, spaces: list[ops.AllReduceWorkspace], hidden: int, calls: int) -> None:
        shuffled = random.Random(7)
        self.bad = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.post, self.pre = shared(hidden), shared(hidden)
        self.cases = []
        for tokens in (1, 2, 3, 5, 8, 13, 16, 32, 64, 100, 128, 200, 400):
            x = torch.randn(tokens, hidden, device="cuda").bfloat16()
            residual = shared(tokens, hidden, dtype=torch.bfloat16)
            parts = gathered(x)
            want = oracle.norm_add_norm(parts, residual, self.post, self.pre, POST_EPS, PRE_EPS)
            add = oracle.add_norm(parts, residual, self.pre, PRE_EPS)
            self.cases.append((x, residual, want, add))
        weights = [30, 10, 10, 10, 10, 5, 10, 5, 5, 2, 2, 1, 1]
        self.calls = [
            (shuffled.choices(self.cases, weights)[0], shuffled.choice(spaces), shuffled.random())
            for _ in range(calls)
        ]

    def run(self, delays: random.Random) -> None:
        for (x, residual, want, add), space, kind in self.calls:
            if delays.random() < 0.2:
                torch.cuda._sleep(delays.randrange(20_000))
            if kind < 0.5:
                got = ops.all_reduce_rms_norm_add_rms_norm(
                    x, residual, self.post, self.pre, space, POST_EPS, PRE_EPS
                )
            else:
                want = add
                got = ops.all_reduce_add_rms_norm(x, residual, self.pre, space, PRE_EPS)
            for value, expected in zip(got, want, strict=True):
                different = value.view(torch.int16) != expected.view(torch.int16)
                self.bad += different.any()


def stress(args: argparse.Namespace) -> dict[str, Any]:
    rank, hidden = dist.get_rank(), args.hidden
    delays = random.Random(rank)
    row = hidden * 2
    spaces = [
        ops.AllReduceWorkspace(hidden=hidden, max_tokens=256, timeout=60.0),
        # Two-shot from 9 rows on.
        ops.AllReduceWorkspace(hidden=hidden, max_tokens=512, one_shot_bytes=8 * row, timeout=60.0),
    ]
    plans = [Plan(spaces, hidden, 250) for _ in range(4)]
    graphs = []
    for plan in plans:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan.run(delays)
        graphs.append(graph)
    eager = Plan(spaces, hidden, 3)
    order = random.Random(11)
    done, begin = 0, time.perf_counter()
    while done < args.calls:
        chosen = order.randrange(len(plans))
        graphs[chosen].replay()
        if delays.random() < 0.1:
            time.sleep(delays.random() * 2e-3)
        eager.run(delays)
        done += len(plans[chosen].calls) + len(eager.calls)
        if done % 100 < 3:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    bad = sum(int(plan.bad) for plan in [*plans, eager])
    total = torch.tensor([bad], device="cuda")
    dist.all_reduce(total)
    assert int(total) == 0, f"{int(total)} results differ"
    for space in spaces:
        space.destroy()
    return {"calls": done, "seconds": round(seconds, 1), "hidden": hidden, "different": 0}


def short(args: argparse.Namespace) -> dict[str, Any]:
    """A few calls of every kind, for tools that slow each down a hundredfold."""
    for one_shot in (None, 2 * 1152 * 2):
        with ops.AllReduceWorkspace(hidden=1152, max_tokens=64, one_shot_bytes=one_shot) as space:
            for tokens in (1, 3, 17):
                x = torch.randn(tokens, 1152, device="cuda").bfloat16()
                check_rows(space, x, shared(tokens, 1152, dtype=torch.bfloat16))
    return {"calls": 42}


def stuck(args: argparse.Namespace) -> dict[str, Any]:
    space = ops.AllReduceWorkspace(hidden=640, max_tokens=8, timeout=0.5)
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(8)
        os._exit(0)
    ops.all_reduce(torch.ones(1, 640, device="cuda").bfloat16(), space)
    begin = time.perf_counter()
    try:
        torch.cuda.synchronize()
    except Exception as error:
        print(f"stopped after {time.perf_counter() - begin:.1f} s: {str(error)[:80]}", flush=True)
        os._exit(7)
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("grid", "stress", "short", "stuck"))
    parser.add_argument("--quick", action="store_true", help="fewer row lengths")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--hidden", type=int, default=5376)
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    if args.what == "short":
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("nccl", device_id=device)
    torch.manual_seed(dist.get_rank())
    result = {"grid": grid, "stress": stress, "short": short, "stuck": stuck}[args.what](args)
    if dist.get_rank() == 0:
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
