#!/usr/bin/env python3
"""Times vLLM's decoding, as it comes against gemma-fold's native mode, in one alternating run.

    python benchmarks/vllm.py --tp 2 --model-shape gemma3-27b --result benchmarks/results/NAME.json
    python benchmarks/vllm.py --profile --tp 2          # where a decode step's time goes
    python benchmarks/vllm.py --rehearse                # on a CPU, two small layers

Two engines live side by side, each in processes of its own, with the same options and random
weights, and take turns: in every repeat, at every concurrency, one after the other. Stock is vLLM
with its default compilation and its all-reduce + norm fusion on; ours is the same with
GEMMA_FOLD=native, on the same original config. A time per output token is that between two engine
outputs that hold one token of every sequence; prefill does not count. Tokens per second are those
of the whole batch, with its prefill.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this folder holds a vllm.py

from benchmarks import vllm_shapes  # noqa: E402
from benchmarks.run_meta import engine_meta  # noqa: E402

ROOT = Path(sys.path[0])
ENGINE = ROOT / "benchmarks" / "vllm_engine.py"
STOCK, OURS = "stock", "gemma_fold"

# NVLink multicast stays off: FlashInfer's "mnnvl" backend, vLLM's default, needs it; "trtllm" does
# not.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "PYTHONUNBUFFERED": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: two engines rehearse on one machine
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


class Child:
    """An engine process and the two pipes to it."""

    def __init__(self, impl: str, options: dict[str, Any], work: Path) -> None:
        self.impl = impl
        self._log = work / f"{impl}.log"
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        arguments = [str(theirs_in), str(theirs_out), json.dumps(options)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(ENGINE), *arguments],
                env=_environment(impl, work),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs_in, theirs_out),
                start_new_session=True,
            )
        os.close(theirs_in)
        os.close(theirs_out)
        self._answers = os.fdopen(self._in)
        self._commands = os.fdopen(self._out, "w", buffering=1)

    def read(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            tail = "".join(self._log.open().readlines()[-60:])
            raise SystemExit(f"{tail}\nthe {self.impl} engine ended; its log ends above")
        return json.loads(line)  # type: ignore[no-any-return]

    def ask(self, **command: Any) -> dict[str, Any]:
        self._commands.write(json.dumps(command) + "\n")
        return self.read()

    def native_lines(self) -> list[str]:
        """What gemma-fold said while the engine started."""
        return [line.rstrip() for line in self._log.open() if "gemma-fold: " in line]

    def stop(self) -> None:
        with suppress(OSError, subprocess.TimeoutExpired):
            self._commands.write('{"do": "exit"}\n')
            self._process.wait(30)
        with suppress(ProcessLookupError):  # the engine's own processes too
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _environment(impl: str, work: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("GEMMA_FOLD")}
    env |= ENVIRONMENT
    if impl == STOCK:
        return {**env, "VLLM_PLUGINS": ""}
    env |= {k: v for k, v in os.environ.items() if k.startswith("GEMMA_FOLD_")}
    env["GEMMA_FOLD"] = "native"
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    if not any(e.name == "gemma_fold" for e in entry_points(group="vllm.general_plugins")):
        paths.insert(0, str(_entry_point(work)))
    return {**env, "PYTHONPATH": os.pathsep.join(paths)}


def _entry_point(work: Path) -> Path:
    """Where gemma-fold is not installed: the metadata by which vLLM finds its plug-in."""
    folder = work / "site"
    info = folder / "gemma_fold-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gemma-fold\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ngemma_fold = gemma_fold.engines.vllm:register\n"
    )
    return folder


def engine_options(args: argparse.Namespace, impl: str, work: Path) -> dict[str, Any]:
    model, traces = work / "model", work / f"traces-{impl}"
    model.mkdir(exist_ok=True)
    config = vllm_shapes.config(args.model_shape, args.layers, small=args.rehearse)
    (model / "config.json").write_text(json.dumps(config))
    most = max(args.concurrency)
    sizes = [n for n in (1, 2, 4, 8, 16, 24, 32, 64, 128, 256) if n <= most]
    engine: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "seed": 0,
        "tensor_parallel_size": args.tp,
        "max_model_len": max(map(sum, args.lengths)) + 16,
        "max_num_seqs": most,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "enforce_eager": args.eager,
        "compilation_config": {"cudagraph_capture_sizes": sorted({*sizes, most})},
    }
    if not args.rehearse:
        engine["gpu_memory_utilization"] = args.memory
        # Two engines that start at once would each count the other's memory as their own.
        engine["kv_cache_memory_bytes"] = int(args.kv_cache_gib * 2**30)
        engine["kernel_config"] = {"enable_flashinfer_autotune": False}
        fusion = args.tp > 1 and not args.eager
        engine["compilation_config"]["pass_config"] = {"fuse_allreduce_rms": fusion}
    if "text_config" in config:
        engine["language_model_only"] = True
        # The default on Hopper would compile FlashInfer's kernel for prefill when it starts.
        engine["additional_config"] = {"gdn_prefill_backend": "triton"}
    if args.profile:
        engine["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": str(traces),
            "torch_profiler_with_stack": False,
        }
    return {"engine": engine, "traces": str(traces)}


def measure(children: list[Child], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each concurrency and engine."""
    found: dict[tuple[int, int, int, str], list[dict[str, Any]]] = {}
    for prompt, new in args.lengths:
        for n in args.concurrency:
            for child in children:
                child.ask(do="measure", concurrency=n, input=prompt, output=16, seed=n)
        for repeat in range(turns(args.repeats, new)):
            for n in args.concurrency:
                for child in children:
                    sizes = {"concurrency": n, "input": prompt, "output": new}
                    answer = child.ask(do="measure", seed=1000 * repeat + n, **sizes)
                    found.setdefault((prompt, new, n, child.impl), []).append(answer)
                    tpot = 1e3 * statistics.median(answer["gaps"])
                    print(f"repeat {repeat} {sizes} {child.impl}: {tpot:.3f} ms", flush=True)
    for (prompt, new, n, impl), runs in found.items():
        gaps = [1e3 * gap for one in runs for gap in one["gaps"]]
        cuts = statistics.quantiles(gaps, n=10)
        yield {
            "model": args.model_shape,
            "tp": args.tp,
            "concurrency": n,
            "input": prompt,
            "output": new,
            "impl": impl,
            "tpot_ms": round(statistics.median(gaps), 4),
            "tokens_per_s": round(
                sum(r["tokens"] for r in runs) / sum(r["seconds"] for r in runs), 1
            ),
            "p10_ms": round(cuts[0], 4),
            "p90_ms": round(cuts[-1], 4),
            "steps": len(gaps),
            "eager": args.eager,
            "layers": args.layers,
            "repeats_ms": [round(1e3 * statistics.median(r["gaps"]), 4) for r in runs],
        }


def turns(repeats: int, new: int) -> int:
    """Fewer for long outputs, of which one has many steps: each engine still has a turn."""
    return min(repeats, max(1, repeats * 128 // new))


def length(text: str) -> tuple[int, int]:
    prompt, _, new = text.partition("/")
    return int(prompt), int(new)


def profile(children: list[Child], args: argparse.Namespace) -> dict[str, Any]:
    """Kernels of one decode step at the smallest concurrency, by engine."""
    n, layers = min(args.concurrency), args.layers
    tables = {}
    for child in children:
        answer = child.ask(do="profile", concurrency=n, input=32, output=64, seed=1)
        tables[child.impl] = answer["kernels"]
        total = sum(us for _, us in answer["kernels"].values())
        per_layer = f", {total / layers:.1f} a layer" if layers else ""
        print(f"\n{child.impl}: {total:.0f} us in the kernels of a step{per_layer}")
        for name, (launches, us) in list(answer["kernels"].items())[:30]:
            print(f"{us:10.1f} us {launches:7.1f} x  {name[:110]}")
    return {"concurrency": n, "kernels": tables}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-shape", choices=vllm_shapes.NAMES, default="gemma3-27b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--layers", type=int, help="a shorter model")
    parser.add_argument(
        "--concurrency", type=lambda s: [int(n) for n in s.split(",")], default=[1, 8, 32]
    )
    parser.add_argument(
        "--lengths", type=length, nargs="+", default=[(32, 128)], help="input/output, in tokens"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="no torch.compile, no CUDA graphs")
    parser.add_argument("--memory", type=float, default=0.42, help="of each engine, of a GPU")
    parser.add_argument("--kv-cache-gib", type=float, default=8.0, help="of each engine, on a GPU")
    parser.add_argument("--profile", action="store_true", help="also profile one decode step")
    parser.add_argument("--result", type=Path, help="where to write the rows as JSON")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    parser.add_argument("--rehearse", action="store_true", help="small layers, on a CPU")
    args = parser.parse_args()
    if args.rehearse:
        args.layers = args.layers or 2
    return args


def main() -> None:
    args = arguments()
    work = Path(tempfile.mkdtemp(prefix="gemma-fold-bench-"))
    children: list[Child] = []
    try:
        start = time.perf_counter()
        for impl in (STOCK, OURS):
            children.append(Child(impl, engine_options(args, impl, work), work))
        about = {child.impl: child.read() for child in children}
        for child in children:
            print(f"{child.impl}: {about[child.impl]}", *child.native_lines(), sep="\n  ")
        print(f"both engines up after {time.perf_counter() - start:.0f} s", flush=True)
        meta = {**engine_meta("vllm", args.tp), "engines": about}
        result: dict[str, Any] = {"meta": meta, "rows": list(measure(children, args))}
        for row in result["rows"]:
            print(json.dumps(row))
        if args.profile:
            result["profile"] = profile(children, args)
        if args.result:
            args.result.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        for child in children:
            child.stop()
        if args.logs:
            args.logs.mkdir(parents=True, exist_ok=True)
            for log in work.glob("*.log"):
                shutil.copy(log, args.logs)
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
