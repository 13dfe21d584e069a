"""Times the linear layer of a few tokens against torch's product and a copy of the weight.

    python -m benchmarks.linear --tune benchmarks/results/linear_shapes_h200.json
    python -m benchmarks.linear --out benchmarks/results/linear_h200.json

Needs a CUDA GPU. Every implementation is captured into a CUDA graph of calls over rotating weights,
three times the L2 in all, and the graphs are replayed in turn; the figure is the median time of a
call. Results are checked against float64 before anything is timed: no further from it than torch's.

`--tune` times every shape of the kernel and writes `gemma_fold/ops/kernels/linear_shapes.json`: for
each weight the number of warps, which fixes the order of the sums, that is best over all tokens,
and for each number of tokens the rest; nothing beyond the tokens at which torch's product is level.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.graph_timing import Call, measure
from benchmarks.result import COPY, OURS, STOCK, Row, Settings
from benchmarks.run import ROOT, add_options, gpus, versions, write
from gemma_fold import ops
from gemma_fold.ops.operators.linear import Shape, gelu_mul, most_tokens, run_shape
from gemma_fold.ops.program import MOST_SHARED

MEASURES = {"us": "microseconds of a call in a CUDA graph"}
SHAPES = ROOT / "gemma_fold/ops/kernels/linear_shapes.json"
TOKENS = (1, 2, 4, 8, 16)
ROUNDS = 9
#: The kernel has to take less than this share of the time of torch's product.
WORTH = 0.98
#: By model: width, width of all q heads, of all k heads, and of the feed-forward block.
MODELS = {
    "gemma3-270m": (640, 1024, 256, 2048),
    "gemma3-1b": (1152, 1024, 256, 6912),
    "gemma3-4b": (2560, 2048, 1024, 10240),
    "gemma3-12b": (3840, 4096, 2048, 15360),
    "gemma3-27b": (5376, 4096, 2048, 21504),
    "gemma2-2b": (2304, 2048, 1024, 9216),
    "gemma2-9b": (3584, 4096, 2048, 14336),
    "gemma2-27b": (4608, 4096, 2048, 36864),
}
#: Tensor parallel sizes that a model's layers are timed for.
SPLITS = {"gemma3-12b": (1, 2), "gemma3-27b": (1, 2, 4), "gemma2-27b": (1, 2, 4)}
CANDIDATES = [
    Shape(warps, tiles, stages)
    for warps in (4, 8)
    for tiles in (1, 2, 4)
    for stages in (2, 3, 4, 6)
    if Shape(warps, tiles, stages).shared(16) <= MOST_SHARED
]


def weights() -> Iterator[tuple[str, str, int, int]]:
    """Model and GPUs, layer, N and K. `mlp` is gate_up with its GELU."""
    for model, (hidden, q, kv, inner) in MODELS.items():
        for split in SPLITS.get(model, (1,)):
            name = model if split == 1 else f"{model} / {split}"
            yield name, "qkv", (q + 2 * kv) // split, hidden
            yield name, "o", hidden, q // split
            yield name, "gate_up", 2 * inner // split, hidden
            yield name, "mlp", 2 * inner // split, hidden
            yield name, "down", hidden, inner // split


class Buffers:
    """Rotating weights, and tokens."""

    def __init__(self, n: int, k: int) -> None:
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.sets = max(3, 3 * l2 // (2 * n * k) + 2)
        self.calls = self.sets * math.ceil(24 / self.sets)
        self.w = [_random(n, k) * 0.02 for _ in range(self.sets)]
        self.copies = [torch.empty_like(self.w[0]) for _ in range(2)]
        self.x = _random(max(TOKENS), k)

    def check(self, x: Tensor, y: Tensor, tail: Tensor, gated: bool) -> None:
        """Raises AssertionError for `y`, whose last row alone is `tail`."""
        w = self.w[0]
        exact = x.double() @ w.double().T
        if gated:
            gate, up = exact.chunk(2, dim=-1)
            exact = torch.nn.functional.gelu(gate, approximate="tanh") * up
        allowed = (_apart(x, w, gated).double() - exact).norm() * 1.02
        error = (y.double() - exact).norm()
        if not error <= allowed:
            raise AssertionError(f"error {error} of {list(w.shape)}, torch's {allowed}")
        if not torch.equal(y[-1], tail[0]):
            raise AssertionError(f"{list(w.shape)}: a row depends on how many there are")

    def stock(self, x: Tensor, gated: bool) -> dict[str, Call]:
        return {
            STOCK: lambda i: _apart(x, self.w[i], gated),
            COPY: lambda i: self.copies[i % 2].copy_(self.w[i]),
        }


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _apart(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    """torch's product, and our kernel for GELU, which as Inductor's is one launch."""
    product = torch.nn.functional.linear(x, weight)
    return gelu_mul(product) if gated else product


def tune(rounds: int) -> tuple[dict[str, list[list[Any]]], list[dict[str, Any]]]:
    """The table of shapes by operator, and every time."""
    table: dict[str, list[list[Any]]] = {"linear": [], "gelu_linear": []}
    times = []
    for gated, n, k in dict.fromkeys((what == "mlp", n, k) for _, what, n, k in weights()):
        b = Buffers(n, k)
        ratios: dict[int, dict[Shape, float]] = {}
        for tokens in TOKENS:
            x = b.x[:tokens]
            calls = b.stock(x, gated)
            for shape in CANDIDATES:
                y = run_shape(x, b.w[0], shape, gated=gated)
                b.check(x, y, run_shape(x[-1:], b.w[0], shape, gated=gated), gated)
                calls[str(shape)] = _shaped(b, x, shape, gated)
            us = measure(calls, b.calls, b.sets, rounds)
            ratios[tokens] = {shape: us[str(shape)] / us[STOCK] for shape in CANDIDATES}
            times.append({"gated": gated, "n": n, "k": k, "tokens": tokens, "us": us})
            torch.cuda.empty_cache()
        if steps := chosen(ratios):
            table["gelu_linear" if gated else "linear"].append([n, k, *steps])
        print("mlp" if gated else "", n, k, steps, flush=True)
    return table, times


def _shaped(b: Buffers, x: Tensor, shape: Shape, gated: bool) -> Call:
    return lambda i: run_shape(x, b.w[i], shape, gated=gated)


def chosen(ratios: dict[int, dict[Shape, float]]) -> list[Any]:
    """Warps, and for each number of tokens at most the rest: what is worth it, from 1 on."""
    best = {
        warps: {
            tokens: min(((r, s) for s, r in of.items() if s.warps == warps), key=lambda one: one[0])
            for tokens, of in ratios.items()
        }
        for warps in {shape.warps for of in ratios.values() for shape in of}
    }
    warps = min(best, key=lambda w: sum(r for tokens, (r, _) in best[w].items() if tokens <= 8))
    steps = []
    for tokens, (ratio, shape) in best[warps].items():
        if ratio > WORTH:
            break
        steps.append([tokens, shape.row_tiles, shape.stages])
    return [warps, steps] if steps else []


def time_operator(rounds: int) -> Iterator[Row]:
    """Rows of every weight and number of tokens."""
    for model, layer, n, k in weights():
        b = Buffers(n, k)
        for tokens in TOKENS:
            x = b.x[:tokens]
            gated = layer == "mlp"
            run = _ours(b, x, gated)
            alone = tokens <= most_tokens(b.w[0], gated=gated)
            tail = _ours(b, x[-1:], gated)(0) if alone else run(0)[-1:]
            b.check(x, run(0), tail, gated)
            calls = {**b.stock(x, gated), OURS: run}
            case = {"model": model, "layer": layer, "n": n, "k": k, "tokens": tokens}
            for name, us in measure(calls, b.calls, b.sets, rounds).items():
                yield Row(case, name, {"us": round(us, 3)})


def _ours(b: Buffers, x: Tensor, gated: bool) -> Call:
    operator = ops.gelu_linear if gated else ops.linear
    return lambda i: operator(x, b.w[i])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tune", type=Path, help="write the table of shapes, and all times here")
    add_options(parser, required=False)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.no_grad():
        if args.tune:
            table, times = tune(args.rounds)
            found = json.loads(SHAPES.read_text()) | {torch.cuda.get_device_name(): table}
            write_table(found, SHAPES)
            args.tune.write_text(json.dumps(times))
        if args.out:
            rows = list(time_operator(args.rounds))
            write(
                args, "linear", machine=gpus(1), versions=versions("torch"), settings=Settings(),
                measures=MEASURES, rows=rows,
            )  # fmt: skip


def write_table(found: dict[str, dict[str, list[Any]]], path: Path) -> None:
    """A line for each weight."""
    devices = []
    for device, by in found.items():
        operators = ",\n".join(_operator(*one) for one in by.items())
        devices.append(f"{json.dumps(device)}: {{\n{operators}\n}}")
    path.write_text("{\n" + ",\n".join(devices) + "\n}\n")


def _operator(name: str, rows: list[Any]) -> str:
    return f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"


if __name__ == "__main__":
    main()
