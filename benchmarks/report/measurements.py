"""docs/measurements.md: decoding in transformers, outputs on GPUs, and conversion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.report.frames import results, wide
from benchmarks.report.words import folded, not_defaults, provenance, table
from benchmarks.result import RESULTS, STOCK, Result

#: Reports of `gemma-fold diff --json`, in the form that docs/diff.md describes.
DIFFS = RESULTS.parent / "diffs"
#: How transformers decoded: what a mode of these runs is called.
MODES = {"eager": "growing cache, eager", "static": "static cache, reduce-overhead"}


def decode() -> str:
    """Milliseconds a token, stock against folded."""
    return "\n\n".join(
        f"{provenance(result)}\n\n{_decoded(result)}" for result in results("transformers")
    )


def speedups(result: Result) -> pd.DataFrame:
    """Time over stock's, by mode and batch."""
    times = wide(result, "ms_per_token")
    return times.div(times[STOCK], axis="index")


def _decoded(result: Result) -> str:
    times, over_stock = wide(result, "ms_per_token"), speedups(result)
    header = ("mode", "batch", "variant", "ms per token", "speed against stock")
    rows = [
        (mode, batch, name, f"{times.loc[(mode, batch), name]:.2f}", f"{1 / ratio:.2f}")
        for (mode, batch), row in over_stock.iterrows()
        for name, ratio in sorted(row.items(), key=lambda item: item[0] != STOCK)
    ]
    settings = folded("Every setting that is not transformers' default", not_defaults(result))
    return f"{table(header, rows)}\n\n{settings}"


def gpu_floor() -> str:
    """Mean KL of the random-weight model, folded and of the original to itself."""
    header = ("", "positions", "folded, one by one", "folded, in a batch", "original: noise floor")
    rows = [
        (result.machine.device, positions, *(f"{row[name]:.3g}" for name in row.index))
        for result in results("transformers_logits")
        for (_, positions), row in wide(result, "mean_kl")[
            ["folded", "folded_batched", "noise_floor"]
        ].iterrows()
    ]
    return table(header, rows)


def gpu_diff() -> str:
    """Outputs of the real 270M, by GPU and compute dtype."""
    return _diffs("270m_h*.json")


def vllm_diff() -> str:
    """Outputs of the real 270M, by vLLM."""
    return _diffs("270m_vllm_*.json")


def _diffs(names: str) -> str:
    header = (
        *("", "compute", "positions", "mean KL", "noise floor", "its measurement"),
        *("same top token", "perplexity"),
    )
    return table(header, map(_compared, sorted(DIFFS.glob(names))))


def _compared(path: Path) -> tuple[str, ...]:
    found: dict[str, Any] = json.loads(path.read_text())
    stats, floor = found["outputs"]["stats"], found["outputs"]["floor"]
    env = found["environment"]
    engine = f"vllm {env['vllm']}, " if "vllm" in env else ""
    return (
        f"{env['gpu']}, {engine}torch {env['torch']}, {env['date'].split()[0]}",
        path.stem.rpartition("_")[2],
        f"{stats['scored']:,}",
        f"{stats['kl_ab']['mean']:.3g}",
        f"{floor['kl_ab']['mean']:.3g}",
        found["outputs"]["floor_how"],
        f"{stats['same_top']:.2%}",
        f"{stats['perplexity_a']:.4f}, {stats['perplexity_b']:.4f}",
    )


def convert() -> str:
    """Seconds and memory of convert and cp, machine by machine."""
    machines: dict[str, list[Result]] = {}
    for result in results("convert"):
        machines.setdefault(_machine(result), []).append(result)
    header = ("case", "command", "seconds", "against cp", "peak memory, MB", "moved by", "commit")
    return "\n\n".join(
        f"{text}\n\n{table(header, (row for run in runs for row in _converted(run)))}"
        for text, runs in machines.items()
    )


def _machine(result: Result) -> str:
    details = result.machine.details
    return (
        f"{result.machine.device}, {details['cores']} cores, {details['memory_gb']} GB, kernel "
        f"{details['kernel']}, python {result.versions['python']}, {result.versions['cp']}. "
        "Seconds are medians."
    )


def _converted(result: Result) -> Iterator[tuple[object, ...]]:
    first = result.rows[0]
    for row in result.rows:
        moved = [
            f"{name.removesuffix('_bytes')} {value / 1e9:.1f} GB"
            for name, value in row.values.items()
            if name.endswith("_bytes")
        ]
        ratio = row.values["seconds"] / first.values["seconds"]
        yield (
            *(row.case["case"], row.impl, row.values["seconds"]),
            f"{ratio:.2f}" if first.impl.startswith("cp") else "",
            *(row.values["peak_rss_mb"], ", ".join(moved), f"`{result.commit}`"),
        )
