"""Times the norm operators against their peers and against a copy of the same bytes.

    python -m benchmarks.norms --out benchmarks/results/norms_h200.json

Needs a CUDA GPU. Every implementation of one operator and shape is captured into a CUDA graph of
many calls over rotating buffers (see ``rotation``), and the graphs are replayed in turn, round
after round; the figure is the median time of a call. Buffers are drawn afresh and every result is
checked against float64 before anything is timed. One process per hidden size: all compile at once,
then they take turns on the GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import norm_peers as peers
from benchmarks import qk_peers as qk
from benchmarks.graph_timing import Call, measure
from benchmarks.result import COPY, OURS, Row
from benchmarks.run import add_options, gpus, versions, write

MEASURES = {
    "us": "microseconds of a call in a CUDA graph",
    "host_us": "microseconds until an eager call returns, the GPU left behind",
}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
HIDDEN = (640, 1152, 2560, 3840, 4096, 5376, 8192)
QK_HEADS = ((32, 16, 128), (4, 1, 256))
PEERS = ["flashinfer", "quack", "liger", "compile"]
EAGER_HIDDEN = 5376
EAGER = (
    "rms_norm",
    "add_rms_norm",
    "add_rms_norm_",
    "rms_norm_add_rms_norm",
    "rms_norm_add_rms_norm_",
)
ROUNDS = 15
MOST_CALLS = 512
# (tokens up to, calls): enough to dwarf a graph launch, few enough to keep large shapes in memory.
FEWEST_CALLS = ((64, 60), (256, 40), (1024, 24), (4096, 12), (2**31, 6))


def rotation(read: int, written: int, tokens: int, most: int = MOST_CALLS) -> tuple[int, int]:
    """Buffer sets, and calls in one graph, which go round the sets; of the bytes a call moves.

    What is read is twice the L2 in all, so that nothing is still there when its turn comes again;
    peers that work in place have no less. Where that would take too many calls, everything stays
    well inside the L2 for everyone instead, as the rows of a decode step do in a model.
    """
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    sets = 2 * l2 // read + 2
    if sets > most:
        sets = max(2, min(FEWEST_CALLS[0][1], l2 // 4 // (read + written)))
    return sets, max(sets, next(calls for limit, calls in FEWEST_CALLS if tokens <= limit))


def row_calls(op: str, b: peers.Buffers, modules: dict[str, Any]) -> dict[str, Call]:
    """Every implementation of a row operator that exists here."""
    found: dict[str, Call | None] = {OURS: peers.ours(op, b)}
    op = op.removesuffix("_")  # the peers are the same, each as its interface has it
    two = "+" if op.startswith("rms_norm_add") else ""
    twice = lambda name: f"{name}+{name}" if two else name  # noqa: E731
    if (fi := modules.get("flashinfer")) and (call := peers.flashinfer_calls(fi, op, b)):
        found[twice("flashinfer-cuda")] = peers.flashinfer_backend(fi, True, call)
        if modules["flashinfer-cute"]:
            found[twice("flashinfer")] = peers.flashinfer_backend(fi, False, call)
    if quack := modules.get("quack"):
        found[twice("quack")] = peers.quack_calls(quack, op, b)
    if liger := modules.get("liger"):
        found[twice("liger")] = peers.liger_calls(liger, op, b)
    if modules.get("compile"):
        found["torch.compile"] = peers.compiled_calls(op, b)
    return {name: call for name, call in found.items() if call is not None}


def drop_failing(calls: dict[str, Call]) -> dict[str, Call]:
    """Runs each once (which compiles it); a peer that cannot run here is reported and left out."""
    working = {}
    for name, call in calls.items():
        try:
            call(0)
            torch.cuda.synchronize()
            working[name] = call
        except Exception:
            if name == OURS:
                raise
            print(f"{name} fails:", traceback.format_exc(limit=-1)[-300:], flush=True)
    return working


def check(op: str, b: peers.Buffers) -> None:
    """Ours against float64: no further from it than one rounding of the dtype and of its input."""
    if "fp8" in op:
        return  # tests/gpu compares every fp8 value with the reference
    x, residual = b.x[0].double(), b.residual[0].double()
    y = peers.ours(op, b)(0)
    y = (b.x[0] if y is None else y if isinstance(y, torch.Tensor) else y[0]).double()

    def norm(v: torch.Tensor) -> torch.Tensor:
        return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + peers.EPS) * b.gamma.double()

    if op.startswith("rms_norm_add_rms_norm"):
        x = norm(x)
    if op != "rms_norm":
        x = residual + x
    error = ((y - norm(x)).norm() / norm(x).norm()).item()
    if not error < 0.01:
        raise AssertionError(f"{op}: relative error {error} at {list(x.shape)}")


def eager_us(op: str, modules: dict[str, Any]) -> dict[str, float]:
    """Host microseconds of one eager call of every implementation."""
    weight = torch.randn(EAGER_HIDDEN, device="cuda").bfloat16()
    b = peers.make_buffers(1, EAGER_HIDDEN, 1, weight)
    found = {}
    for name, call in drop_failing(row_calls(op, b, modules)).items():
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(300):
                call(0)
            times.append((time.perf_counter() - begin) / 300 * 1e6)
        found[name] = statistics.median(times)
    return found


def load_modules(names: list[str]) -> dict[str, Any]:
    modules: dict[str, Any] = {n: peers.installed(n) for n in names if n in peers.MODULES}
    if fi := modules.get("flashinfer"):
        modules["flashinfer-cute"] = not fi._USE_CUDA_NORM
    modules["flashinfer-rope"] = "flashinfer-rope" in names
    modules["compile"] = "compile" in names
    return modules


Calls = Callable[[str, int, int], dict[str, Call]]  # of (op, tokens, buffer sets), by name
Runs = Callable[[list[int], int], list[Row]]  # of the token counts and the rounds


def prepared(hidden: int, wanted: list[str], calls: Calls, check: Callable[[str], None]) -> Runs:
    """Checks and compiles everything for one hidden size; returns what then measures it."""
    for op in wanted:
        check(op)
        for tokens in (37, 1):
            drop_failing(calls(op, tokens, 2))

    def run(tokens_list: list[int], rounds: int) -> list[Row]:
        rows = []
        for op in wanted:
            for tokens in tokens_list:
                read, written = (tokens * hidden * size for size in peers.BYTES[op])
                sets, n = rotation(read, written, tokens)
                found = {COPY: peers.copy(read + written, sets)}
                found |= drop_failing(calls(op, tokens, sets))
                case = {"op": op, "hidden": hidden, "tokens": tokens}
                rows += [
                    Row(case, name, {"us": round(us, 3)})
                    for name, us in measure(found, n, sets, rounds).items()
                ]
        return rows

    return run


def prepare_rows(hidden: int, wanted: list[str], modules: dict[str, Any]) -> Runs:
    """The operators on rows."""
    weight = torch.randn(hidden, device="cuda").bfloat16()

    def calls(op: str, tokens: int, sets: int) -> dict[str, Call]:
        return row_calls(op, peers.make_buffers(tokens, hidden, sets, weight), modules)

    run = prepared(
        hidden, wanted, calls, lambda op: check(op, peers.make_buffers(37, hidden, 2, weight))
    )

    def with_host(tokens_list: list[int], rounds: int) -> list[Row]:
        rows = run(tokens_list, rounds)
        if hidden == EAGER_HIDDEN:
            host = {op: eager_us(op, modules) for op in EAGER if op in wanted}
            for row in rows:
                us = host.get(str(row.case["op"]), {}).get(row.impl)
                if us is not None and row.case["tokens"] == 1:
                    row.values["host_us"] = round(us, 3)
        return rows

    return with_host


def prepare_qk(heads: tuple[int, int, int], wanted: list[str], modules: dict[str, Any]) -> Runs:
    """The operators on q and k, for one set of heads."""

    def calls(op: str, tokens: int, sets: int) -> dict[str, Call]:
        return qk.head_calls(op, qk.make_heads(heads, tokens, sets), modules)

    hidden = (heads[0] + heads[1]) * heads[2]
    return prepared(hidden, wanted, calls, lambda op: qk.check(op, heads))


def worker(prepare: Callable[..., Any], args: argparse.Namespace, ready: Any, turn: Any,
           results: Any) -> None:  # fmt: skip
    """Prepares beside the other workers, waits until all have, then measures alone."""
    try:
        with torch.no_grad():
            run = prepare(modules=load_modules(args.peers))
            torch.cuda.synchronize()
            ready.wait(timeout=args.compile_seconds)
            with turn:
                results.put(run(args.tokens, args.rounds))
                torch.cuda.synchronize()
    except BaseException:
        ready.abort()
        results.put(traceback.format_exc())


def in_turn(jobs: list[Any], args: argparse.Namespace) -> tuple[list[Row], bool]:
    """The rows of every job that did not fail, each in a process of its own; whether one did."""
    context = mp.get_context("spawn")
    ready, turn, results = context.Barrier(len(jobs)), context.Lock(), context.Queue()
    processes = [
        context.Process(target=worker, args=(job, args, ready, turn, results)) for job in jobs
    ]
    for process in processes:
        process.start()
    answers = [results.get() for _ in processes]
    for process in processes:
        process.join()
    failures = [answer for answer in answers if isinstance(answer, str)]
    print(*failures, sep="\n", end="", file=sys.stderr)
    rows = [row for answer in answers if not isinstance(answer, str) for row in answer]
    return sorted(rows, key=lambda row: (*row.case.values(), row.impl)), bool(failures)


def record(jobs: list[Any], args: argparse.Namespace, what: str, **about: Any) -> int:
    """Writes what the jobs measured, with what `run.write` is told about it; the exit code."""
    rows, failed = in_turn(jobs, args)
    if not rows:
        return 1
    write(args, what, machine=gpus(1), rows=rows, **about)
    print(f"{len(rows)} rows in {args.out}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=list(peers.BYTES))
    parser.add_argument("--hidden", nargs="+", type=int, default=list(HIDDEN))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--peers", nargs="*", default=PEERS, help="flashinfer-rope takes minutes")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--compile-seconds", type=float, default=300.0)
    add_options(parser)
    args = parser.parse_args()

    qk_ops = [op for op in args.ops if op.startswith("qk")]
    row_ops = [op for op in args.ops if op not in qk_ops]
    jobs: list[Any] = []
    if row_ops:
        jobs += [partial(prepare_rows, hidden, row_ops) for hidden in args.hidden]
    if qk_ops:
        jobs += [partial(prepare_qk, heads, qk_ops) for heads in QK_HEADS]
    return record(
        jobs,
        args,
        "norms",
        versions=versions("torch", "triton", *peers.MODULES, "cutlass-dsl"),
        settings=peers.SETTINGS,
        measures=MEASURES,
    )


if __name__ == "__main__":
    raise SystemExit(main())
