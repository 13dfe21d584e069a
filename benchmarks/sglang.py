#!/usr/bin/env python3
"""Times SGLang's serving, as it comes against gemma-fold's native mode, in one alternating run.

    python benchmarks/sglang.py --tp 2 --model-shape gemma3-27b --result NAME.json
    python benchmarks/sglang.py --model FOLDER             # real weights instead of random ones
    python benchmarks/sglang.py --rehearse                 # on a CPU, two small layers

Two servers live side by side on the same GPUs, with the same options, and take turns: in every
repeat, at every concurrency, one after the other; the other one is idle. Stock is SGLang without
gemma-fold; ours is the same with GEMMA_FOLD=native, on the same original checkpoint. Prompts are
random tokens, 1,024 in and 1,024 out as a rule.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this folder holds an sglang.py

from benchmarks import sglang_load, vllm_shapes  # noqa: E402
from benchmarks.run_meta import engine_meta  # noqa: E402

ROOT = Path(sys.path[0])
STOCK, OURS = "stock", "gemma_fold"
METRICS = ("output_tokens_per_s", "per_token_ms", "gap_p99_ms", "first_token_ms")
# NVLink multicast stays off: FlashInfer's "mnnvl" all-reduce needs it; "trtllm" does not.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "PYTHONUNBUFFERED": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
ON_CPU = (
    "--device=cpu",
    "--disable-cuda-graph",
    "--cuda-graph-backend-prefill=disabled",
    "--sampling-backend=pytorch",
)


class Server:
    """An SGLang server in processes of its own."""

    def __init__(self, impl: str, model: Path, options: list[str], work: Path) -> None:
        self.impl, self._log = impl, work / f"{impl}.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-P", "-m", "sglang.launch_server", "--model-path", str(model)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, f"--port={port}", *options],
                env=environment(impl, work),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        while True:
            if self._process.poll() is not None:
                raise SystemExit(f"{self.log()}\nthe {self.impl} server ended; its log ends above")
            with suppress(OSError):
                urllib.request.urlopen(self.url + "/health", timeout=5).close()
                return
            time.sleep(1)

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def environment(impl: str, work: Path) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("GEMMA_FOLD")} | ENVIRONMENT
    if impl == STOCK:
        return {**env, "SGLANG_PLUGINS": "none"}
    info = work / "site" / "gemma_fold-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)  # by which SGLang finds it where it is not installed
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gemma-fold\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\ngemma_fold = gemma_fold.engines.sglang:register\n"
    )
    paths = [str(info.parent), str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    return {**env, "GEMMA_FOLD": "native", "PYTHONPATH": os.pathsep.join(paths)}


def server_options(args: argparse.Namespace, memory: float) -> list[str]:
    options = [
        "--skip-tokenizer-init",
        "--skip-server-warmup",
        "--disable-radix-cache",
        "--grammar-backend=none",
        f"--tp-size={args.tp}",
        f"--context-length={args.input + args.output + 16}",
        f"--max-running-requests={max(args.concurrency)}",
        f"--mem-fraction-static={memory:.3f}",
        *([] if args.model else ["--load-format=dummy"]),
        *(ON_CPU if args.rehearse else ()),
    ]
    return options + args.server_option


def rounds(servers: list[Server], args: argparse.Namespace, vocab: int) -> Iterator[dict[str, Any]]:
    """What each server did in each repeat; the first, which compiles and warms up, is left out."""
    for repeat in range(-1, args.repeats):
        for concurrency in args.concurrency:
            for server in servers if repeat % 2 else servers[::-1]:
                row = sglang_load.measure(
                    server.url,
                    concurrency=concurrency,
                    requests=concurrency if repeat < 0 else concurrency * args.waves,
                    length=args.input,
                    tokens=args.output,
                    vocab=vocab,
                    seed=1000 * repeat + concurrency,
                )
                if repeat >= 0:
                    yield {"impl": server.impl, "repeat": repeat, **row}


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over the repeats, before and after, as Markdown."""
    lines = ["| concurrency | | stock | gemma-fold | ratio |", "|---|---|---|---|---|"]
    for concurrency in sorted({row["concurrency"] for row in rows}):
        for metric in METRICS:
            before, after = (
                statistics.median(
                    row[metric]
                    for row in rows
                    if row["impl"] == impl and row["concurrency"] == concurrency
                )
                for impl in (STOCK, OURS)
            )
            lines.append(
                f"| {concurrency} | {metric} | {before:.2f} | {after:.2f} | {after / before:.3f} |"
            )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="an original checkpoint, instead of a shape")
    parser.add_argument("--model-shape", default="gemma3-27b", choices=vllm_shapes.NAMES)
    parser.add_argument("--layers", type=int, help="keep only so many layers of the shape")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--input", type=int, default=1024)
    parser.add_argument("--output", type=int, default=1024)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--waves", type=int, default=2, help="requests per slot of concurrency")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.42, help="of a GPU, for each server")
    parser.add_argument("--server-option", action="append", default=[], help="for both servers")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, small, a few tokens")
    parser.add_argument("--result", type=Path)
    args = parser.parse_args()
    if args.rehearse:
        args.input, args.output, args.concurrency, args.repeats = 8, 6, [2], 1
    return args


def main() -> None:
    args = arguments()
    work = Path(tempfile.mkdtemp(prefix="gemma-fold-bench-"))
    servers: list[Server] = []
    try:
        model = args.model or work / "model"
        if args.model is None:
            model.mkdir()
            layers = 2 if args.rehearse else args.layers
            config = vllm_shapes.config(args.model_shape, layers, small=args.rehearse)
            config["hidden_act"] = config.get("hidden_activation", config.get("hidden_act"))
            (model / "config.json").write_text(json.dumps(config))
        config = json.loads((model / "config.json").read_text())
        vocab = config.get("text_config", config)["vocab_size"]
        # One after the other: SGLang takes a share of the memory that it finds free.
        for impl, share in ((STOCK, args.memory), (OURS, args.memory / (1 - args.memory))):
            servers.append(Server(impl, model, server_options(args, share), work))
            servers[-1].wait()
        rows = list(rounds(servers, args, vocab))
        print(table(rows))
        if args.result:
            result = {"meta": engine_meta("sglang", args.tp), "rows": rows}
            args.result.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        for server in servers:
            server.stop()
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
