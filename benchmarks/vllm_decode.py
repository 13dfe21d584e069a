"""Times vLLM's decoding, as it comes against gemma-fold's native mode, in one alternating run.

    python -m benchmarks.vllm_decode --tp 2 --model-shape gemma3-27b --result NAME.json
    python -m benchmarks.vllm_decode --tp 2 --profile     # where a decode step's time goes
    python -m benchmarks.vllm_decode --rehearse           # on a CPU, two small layers

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
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import engines, model_shapes, run
from benchmarks.result import OURS, STOCK, Row

#: Run by its path: what stock imports must not come from this repository.
ENGINE = Path(__file__).with_name("vllm_engine.py")
PLUGIN = engines.Plugin(
    "vllm.general_plugins", "gemma_fold.engines.vllm:register", hidden={"VLLM_PLUGINS": ""}
)
# FlashInfer's "mnnvl" all-reduce, vLLM's default, needs NVLink multicast; "trtllm" does not.
ENVIRONMENT = {
    **engines.ENVIRONMENT,
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
#: GiB: two engines rehearse on one machine.
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1"}
MEASURES = {
    "ms_per_token": "milliseconds between two outputs that hold a token of every sequence",
    "ms_per_token_p10": "the same",
    "ms_per_token_p90": "the same",
    "ms_per_token_repeats": "the same, in each repeat",
    "tokens_per_s": "tokens a second of the whole batch, with its prefill",
    "steps": "how many such times there are",
}
#: Input and output of a profiled run, in tokens.
PROFILED_LENGTH = (32, 64)
PROFILED = {
    "us": "microseconds of the kernel in one decode step",
    "launches": "of the kernel in one decode step",
}


class Child:
    """An engine process and the two pipes to it.

    Attributes:
        impl: whose norms it runs.
        name: what rows call it.
    """

    def __init__(
        self,
        impl: str,
        options: dict[str, Any],
        given: dict[str, str],
        work: Path,
        name: str = "",
    ) -> None:
        self.impl = impl
        self.name = name or impl
        self._log = work / f"{self.name}.log"
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        sent = {"engine": options, "traces": str(_traces(impl, work))}
        arguments = [str(theirs_in), str(theirs_out), json.dumps(sent)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(ENGINE), *arguments],
                env=engines.environment(impl, PLUGIN, given, work),
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
            raise SystemExit(engines.ended(self.name, self._log))
        return json.loads(line)

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
        engines.stop(self._process)


def _traces(impl: str, work: Path) -> Path:
    return work / f"traces-{impl}"


def engine_options(
    args: argparse.Namespace, config: dict[str, Any], impl: str, work: Path
) -> dict[str, Any]:
    """For `vllm.LLM`, beside the model's folder."""
    most = max(args.concurrency)
    sizes = [n for n in (1, 2, 4, 8, 16, 24, 32, 64, 128, 256) if n <= most]
    engine: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "seed": 0,
        "tensor_parallel_size": args.tp,
        "max_model_len": max(map(sum, [*args.lengths, PROFILED_LENGTH])) + 16,
        "max_num_seqs": most,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "compilation_config": {"cudagraph_capture_sizes": sorted({*sizes, most})},
    }
    if args.eager:
        engine["enforce_eager"] = True
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
            "torch_profiler_dir": str(_traces(impl, work)),
            "torch_profiler_with_stack": False,
        }
    return engine


def case(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What a row of a result is about, with `more` that tells it from others."""
    return {"model": args.model_shape, "layers": args.layers, "eager": args.eager, **more}


def measure(children: list[Child], args: argparse.Namespace) -> Iterator[Row]:
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
        yield Row(
            case(args, input=prompt, output=new, concurrency=n),
            impl,
            {
                "ms_per_token": round(statistics.median(gaps), 4),
                "ms_per_token_p10": round(cuts[0], 4),
                "ms_per_token_p90": round(cuts[-1], 4),
                "ms_per_token_repeats": [
                    round(1e3 * statistics.median(r["gaps"]), 4) for r in runs
                ],
                "tokens_per_s": round(
                    sum(r["tokens"] for r in runs) / sum(r["seconds"] for r in runs), 1
                ),
                "steps": len(gaps),
            },
        )


def turns(repeats: int, new: int) -> int:
    """Fewer for long outputs, of which one has many steps: each engine still has a turn."""
    return min(repeats, max(1, repeats * 128 // new))


def length(text: str) -> tuple[int, int]:
    prompt, _, new = text.partition("/")
    return int(prompt), int(new)


def profile(children: list[Child], args: argparse.Namespace) -> Iterator[Row]:
    """Kernels of one decode step at the smallest concurrency, by engine."""
    n, layers, (prompt, new) = min(args.concurrency), args.layers, PROFILED_LENGTH
    for child in children:
        kernels = child.ask(do="profile", concurrency=n, input=prompt, output=new, seed=1)[
            "kernels"
        ]
        total = sum(us for _, us in kernels.values())
        per_layer = f", {total / layers:.1f} a layer" if layers else ""
        print(f"\n{child.impl}: {total:.0f} us in the kernels of a step{per_layer}")
        for name, (launches, us) in list(kernels.items())[:30]:
            print(f"{us:10.1f} us {launches:7.1f} x  {name[:110]}")
        for name, (launches, us) in kernels.items():
            at = case(args, concurrency=n, kernel=name)
            yield Row(at, child.impl, {"us": us, "launches": launches})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-shape", choices=model_shapes.NAMES, default="gemma3-27b")
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
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    parser.add_argument("--rehearse", action="store_true", help="small layers, on a CPU")
    run.add_options(parser, required=False)
    args = parser.parse_args()
    if args.rehearse:
        args.layers = args.layers or 2
    return args


def wait(children: list[Child]) -> dict[str, Any]:
    """What each engine says of itself once it is up, by its name; printed, too."""
    about = {child.name: child.read() for child in children}
    for child in children:
        print(f"{child.name}: {about[child.name]}", *child.native_lines(), sep="\n  ")
    return about


def keep_logs(work: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for log in work.glob("*.log"):
        shutil.copy(log, folder)


def main() -> None:
    args = arguments()
    with engines.workplace() as (work, at_end):
        if args.logs:
            at_end.callback(keep_logs, work, args.logs)
        start = time.perf_counter()
        children: list[Child] = []
        config = model_shapes.config(args.model_shape, args.layers, small=args.rehearse)
        model = model_shapes.write(config, work)
        options = {impl: engine_options(args, config, impl, work) for impl in (STOCK, OURS)}
        given = ENVIRONMENT | (ON_CPU if args.rehearse else {})
        for impl, own in options.items():
            children.append(Child(impl, {"model": str(model), **own}, given, work))
            at_end.callback(children[-1].stop)
        about = wait(children)
        print(f"both engines up after {time.perf_counter() - start:.0f} s", flush=True)
        for own in options.values():
            own.pop("profiler_config", None)  # off while anything is timed
        write = partial(
            run.write,
            args,
            machine=run.gpus(args.tp),
            versions=run.versions("torch", "triton", "vllm", "flashinfer"),
            settings=engines.settings(PLUGIN, given, options, about),
        )
        rows = list(measure(children, args))
        print(*rows, sep="\n")
        if args.out:
            write("vllm", measures=MEASURES, rows=rows)
        if args.profile:
            kernels = list(profile(children, args))
            if args.out and kernels:  # a CPU runs none
                out = args.out.with_stem(f"{args.out.stem}_profile")
                write("vllm_profile", measures=PROFILED, rows=kernels, out=out)


if __name__ == "__main__":
    main()
