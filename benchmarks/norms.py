"""Times the norm operators against their peers and against a copy of the same bytes.

    python benchmarks/norms.py --out benchmarks/results/norms_h200.json

Needs a CUDA GPU. Every implementation of one operator and shape is captured into a CUDA graph of
many calls over rotating buffers (see ``rotation``), and the graphs are replayed in turn, round
after round; the figure is the median time of a call. Buffers are drawn afresh and every result is
checked against float64 before anything is timed. One process per hidden size: all compile at once,
then they take turns on the GPU.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing as mp
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import norm_peers as peers  # noqa: E402
import qk_peers as qk  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from graph_timing import capture, time_interleaved  # noqa: E402
from run_meta import git_commit, result_text  # noqa: E402

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


def rotation(op: str, tokens: int, hidden: int) -> tuple[int, int]:
    """Buffer sets, and calls in one graph, which go round the sets.

    What is read is twice the L2 in all, so that nothing is still there when its turn comes again;
    peers that work in place have no less. Where that would take too many calls, everything stays
    well inside the L2 for everyone instead, as the rows of a decode step do in a model.
    """
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    read, written = (tokens * hidden * size for size in peers.BYTES[op])
    sets = 2 * l2 // read + 2
    if sets > MOST_CALLS:
        sets = max(2, min(FEWEST_CALLS[0][1], l2 // 4 // (read + written)))
    return sets, max(sets, next(calls for limit, calls in FEWEST_CALLS if tokens <= limit))


def row_calls(op: str, b: peers.Buffers, modules: dict[str, Any]) -> dict[str, peers.Call]:
    """Every implementation of a row operator that exists here."""
    found: dict[str, peers.Call | None] = {"gemma_fold": peers.ours(op, b)}
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


def drop_failing(calls: dict[str, peers.Call]) -> dict[str, peers.Call]:
    """Runs each once (which compiles it); a peer that cannot run here is reported and left out."""
    working = {}
    for name, call in calls.items():
        try:
            call(0)
            torch.cuda.synchronize()
            working[name] = call
        except Exception:
            if name == "gemma_fold":
                raise
            print(f"{name} fails:", traceback.format_exc(limit=-1)[-300:], flush=True)
    return working


def measure(calls: dict[str, peers.Call], n: int, sets: int, rounds: int) -> dict[str, float]:
    captured = {name: capture(call, n, sets) for name, call in calls.items()}
    return time_interleaved({name: graph for name, (graph, _) in captured.items()}, n, rounds)


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


def eager_rows(modules: dict[str, Any]) -> list[dict[str, Any]]:
    """Host microseconds of one eager call: the time to return, the GPU left behind."""
    rows = []
    b = peers.make_buffers(1, EAGER_HIDDEN, 1, torch.randn(EAGER_HIDDEN, device="cuda").bfloat16())
    for op in EAGER:
        for name, call in drop_failing(row_calls(op, b, modules)).items():
            best = []
            for _ in range(7):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(300):
                    call(0)
                best.append((time.perf_counter() - begin) / 300 * 1e6)
            row = {"op": f"{op} host", "tokens": 1, "hidden": EAGER_HIDDEN, "impl": name}
            rows.append({**row, "us": statistics.median(best)})
    return rows


def load_modules(names: list[str]) -> dict[str, Any]:
    modules: dict[str, Any] = {n: peers.installed(n) for n in names if n in peers.PACKAGES}
    if fi := modules.get("flashinfer"):
        modules["flashinfer-cute"] = not fi._USE_CUDA_NORM
    modules["flashinfer-rope"] = "flashinfer-rope" in names
    modules["compile"] = "compile" in names
    return modules


def prepare_rows(hidden: int, wanted: list[str], modules: dict[str, Any]) -> Callable[..., Any]:
    """Checks and compiles everything for one hidden size; returns what then measures it."""
    weight = torch.randn(hidden, device="cuda").bfloat16()
    for op in wanted:
        b = peers.make_buffers(37, hidden, 2, weight)
        check(op, b)
        for tokens in (37, 1):
            drop_failing(row_calls(op, peers.make_buffers(tokens, hidden, 2, weight), modules))

    def run(tokens_list: list[int], rounds: int) -> list[dict[str, Any]]:
        rows = []
        for op in wanted:
            for tokens in tokens_list:
                sets, n = rotation(op, tokens, hidden)
                b = peers.make_buffers(tokens, hidden, sets, weight)
                calls = {"copy": peers.copy(op, tokens, hidden, sets)}
                calls |= drop_failing(row_calls(op, b, modules))
                for name, us in measure(calls, n, sets, rounds).items():
                    rows.append(
                        {"op": op, "tokens": tokens, "hidden": hidden, "impl": name, "us": us}
                    )
        eager = hidden == EAGER_HIDDEN and set(wanted) & set(EAGER)
        return rows + eager_rows(modules) if eager else rows

    return run


def prepare_qk(heads: tuple[int, int, int], wanted: list[str], modules: dict[str, Any]) -> Any:
    """The same for the q and k operators and one set of heads."""
    hidden = (heads[0] + heads[1]) * heads[2]
    for op in wanted:
        qk.check(op, heads)
        for tokens in (37, 1):
            drop_failing(qk.head_calls(op, qk.make_heads(heads, tokens, 1), modules))

    def run(tokens_list: list[int], rounds: int) -> list[dict[str, Any]]:
        rows = []
        for op in wanted:
            for tokens in tokens_list:
                sets, n = rotation(op, tokens, hidden)
                calls = {"copy": peers.copy(op, tokens, hidden, sets)}
                b = qk.make_heads(heads, tokens, sets)
                calls |= drop_failing(qk.head_calls(op, b, modules))
                for name, us in measure(calls, n, sets, rounds).items():
                    row = {"op": op, "tokens": tokens, "hidden": hidden, "impl": name}
                    rows.append({**row, "us": us})
        return rows

    return run


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


def command(args: argparse.Namespace) -> str:
    """What repeats this run from the repository's root, whatever folder it wrote to."""
    parts = ["python benchmarks/norms.py --out", f"benchmarks/results/{args.out.name}"]
    defaults = {"ops": list(peers.BYTES), "hidden": list(HIDDEN), "tokens": list(TOKENS)}
    defaults["peers"] = PEERS
    for name, default in defaults.items():
        if getattr(args, name) != default:
            parts += [f"--{name}", *map(str, getattr(args, name))]
    return " ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ops", nargs="+", default=list(peers.BYTES))
    parser.add_argument("--hidden", nargs="+", type=int, default=list(HIDDEN))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--peers", nargs="*", default=PEERS, help="flashinfer-rope takes minutes")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--commit", default=git_commit(), help="where .git does not travel along")
    parser.add_argument("--compile-seconds", type=float, default=300.0)
    args = parser.parse_args()

    qk_ops = [op for op in args.ops if op.startswith("qk")]
    row_ops = [op for op in args.ops if op not in qk_ops]
    jobs: list[Any] = []
    if row_ops:
        jobs += [partial(prepare_rows, hidden, row_ops) for hidden in args.hidden]
    if qk_ops:
        jobs += [partial(prepare_qk, heads, qk_ops) for heads in QK_HEADS]
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
    if failures:
        print(*failures, sep="\n", file=sys.stderr)
    rows = [row for answer in answers if not isinstance(answer, str) for row in answer]
    for row in rows:
        row.update(world=1, dtype="bfloat16", us=round(row["us"], 3))
    meta = {
        "bench": "norms",
        "gpu": torch.cuda.get_device_name(0),
        "world": 1,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "peers": peers.versions(),
        "commit": args.commit,
        "date": datetime.date.today().isoformat(),
        "command": command(args),
    }
    rows.sort(key=lambda r: (r["op"], r["hidden"], r["tokens"], r["impl"]))
    args.out.write_text(result_text(meta, rows=rows))
    print(f"{len(rows)} rows in {args.out}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
