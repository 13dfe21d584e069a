"""Times SGLang's serving, as it comes against gemma-fold's native mode, in one alternating run.

    python -m benchmarks.sglang_serving --tp 2 --model-shape gemma3-27b --result NAME.json
    python -m benchmarks.sglang_serving --model FOLDER      # real weights instead of random ones
    python -m benchmarks.sglang_serving --rehearse          # on a CPU, two small layers

Two servers live side by side on the same GPUs, with the same options, and take turns: in every
repeat, at every concurrency, one after the other; the other one is idle. Stock is SGLang without
gemma-fold; ours is the same with GEMMA_FOLD=native, on the same original checkpoint. Prompts are
random tokens, 1,024 in and 1,024 out as a rule.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from benchmarks import engines, model_shapes, run, sglang_load
from benchmarks.result import OURS, STOCK, Row

PLUGIN = engines.Plugin(
    "sglang.srt.plugins",
    "gemma_fold.engines.sglang:register",
    hidden={"SGLANG_PLUGINS": "none"},
)
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
                env=engines.environment(impl, PLUGIN, engines.ENVIRONMENT, work),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        while True:
            if self._process.poll() is not None:
                raise SystemExit(engines.ended(self.impl, self._log))
            with suppress(OSError):
                urllib.request.urlopen(self.url + "/health", timeout=5).close()
                return
            time.sleep(1)

    def stop(self) -> None:
        engines.stop(self._process)


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


def named(options: list[str]) -> dict[str, str | bool]:
    """Options of a command line by their names; True for those that take no value."""
    pairs = (option.partition("=") for option in options)
    return {name: value if given else True for name, given, value in pairs}


def rounds(servers: list[Server], args: argparse.Namespace, vocab: int) -> Iterator[Row]:
    """What each server did in each repeat; the first, which compiles and warms up, is left out."""
    for repeat in range(-1, args.repeats):
        for concurrency in args.concurrency:
            for server in servers if repeat % 2 else servers[::-1]:
                values = sglang_load.measure(
                    server.url,
                    concurrency=concurrency,
                    requests=concurrency if repeat < 0 else concurrency * args.waves,
                    length=args.input,
                    tokens=args.output,
                    vocab=vocab,
                    seed=1000 * repeat + concurrency,
                )
                if repeat >= 0:
                    case = {
                        "model": args.model.name if args.model else args.model_shape,
                        "layers": args.layers,
                        "input": args.input,
                        "output": args.output,
                        "concurrency": concurrency,
                        "repeat": repeat,
                    }
                    yield Row(case, server.impl, values)


def summary(rows: list[Row]) -> Iterator[str]:
    """Medians over the repeats, stock and ours."""
    for concurrency in sorted({row.case["concurrency"] for row in rows}):
        for measure, what in sglang_load.MEASURES.items():
            stock, ours = (
                statistics.median(
                    row.values[measure]
                    for row in rows
                    if (row.impl, row.case["concurrency"]) == (impl, concurrency)
                )
                for impl in (STOCK, OURS)
            )
            yield f"{concurrency} at once, {what}: {stock:.2f} against {ours:.2f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="an original checkpoint, instead of a shape")
    parser.add_argument("--model-shape", default="gemma3-27b", choices=model_shapes.NAMES)
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
    run.add_options(parser, required=False)
    args = parser.parse_args()
    if args.rehearse:
        args.layers = args.layers or 2
        args.input, args.output, args.concurrency, args.repeats = 8, 6, [2], 1
    return args


def main() -> None:
    args = arguments()
    with engines.workplace() as (work, at_end):
        servers: list[Server] = []
        model = args.model
        if model is None:
            config = model_shapes.config(args.model_shape, args.layers, small=args.rehearse)
            config["hidden_act"] = config.get("hidden_activation", config.get("hidden_act"))
            model = model_shapes.write(config, work)
        config = json.loads((model / "config.json").read_text())
        vocab = config.get("text_config", config)["vocab_size"]
        # One after the other: SGLang takes a share of the memory that it finds free.
        shares = {STOCK: args.memory, OURS: args.memory / (1 - args.memory)}
        options = {impl: server_options(args, share) for impl, share in shares.items()}
        for impl, own in options.items():
            servers.append(Server(impl, model, own, work))
            at_end.callback(servers[-1].stop)
            servers[-1].wait()
        rows = list(rounds(servers, args, vocab))
        print(*summary(rows), sep="\n")
        if args.out:
            run.write(
                args,
                "sglang",
                machine=run.gpus(args.tp),
                versions=run.versions("torch", "triton", "sglang", "flashinfer"),
                settings=engines.settings(
                    PLUGIN, engines.ENVIRONMENT, {i: named(o) for i, o in options.items()}
                ),
                measures={**sglang_load.MEASURES, "requests": "requests in all"},
                rows=rows,
            )


if __name__ == "__main__":
    main()
