"""The pictures of the documents: what each shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from benchmarks.report import all_reduce, engines, norms, plots
from benchmarks.report.frames import DECODE, against_best, everything, geometric_mean, results, wide
from benchmarks.report.plots import Bar, Group, Picture
from benchmarks.report.words import machine
from benchmarks.result import Result
from benchmarks.run import ROOT

IMAGES = ROOT / "docs" / "images"
SIZES = (f"up to {DECODE} tokens", "more tokens")
WHISKER = "Bar: geometric mean. Line: lowest to highest"
SHOWN = {
    "rms_norm": "RMSNorm",
    "add_rms_norm": "Residual add, norm",
    "rms_norm_add_rms_norm": "Norm, residual add, norm",
    "qk_rms_norm": "Norm of q and k",
    "qk_rms_norm_rope": "Norm of q and k, rotary embedding",
    "rms_norm_fp8_static": "RMSNorm to fp8",
    "add_rms_norm_fp8_static": "Residual add, norm to fp8",
    "rms_norm_add_rms_norm_fp8_static": "Norm, residual add, norm to fp8",
}


def _bar(ratios: pd.Series) -> Bar:
    return Bar(*(round(value, 4) for value in (geometric_mean(ratios), ratios.min(), ratios.max())))


def _by_size(ratios: pd.Series) -> tuple[Bar, Bar]:
    small = ratios.index.get_level_values("tokens") <= DECODE
    return _bar(ratios[small]), _bar(ratios[~small])


def whole_engines() -> Picture:
    """Time per output token with gemma-fold, over the same engine without it."""
    runs = engines.headline_runs()
    return Picture(
        title="Time per output token with gemma-fold, over the same engine without",
        axis="time with gemma-fold / time without it; shorter is faster",
        baseline="without",
        series=("fewest requests at once", "most requests at once"),
        groups=tuple(_served(result) for result in runs),
        note="Newest runs first, with the numbers of requests at once. Random weights. "
        "Line: over prompts of two lengths.\n"
        "Neither side ran with the engine's defaults: every setting is listed below the table.",
    )


def _served(result: Result) -> Group:
    """One run, at its lowest and at its highest load."""
    engine = {"sglang": "SGLang", "vllm": "vLLM"}[result.what]
    model = re.sub(r"gemma(\d)-(\d+)b", r"Gemma \1 \2B", engines.shape(result))
    own = engines.fusion(result)
    fusion = "" if result.machine.count == 1 else f", all-reduce fusion {own}"
    fewest, most = engines.at_once(result)
    detail = f"{engine} {result.versions[result.what]}{fusion}; {fewest} and {most} requests"
    bars = tuple(_bar(engines.ratios_at(result, load)) for load in (fewest, most))
    return Group(f"{model.replace('qwen', 'Qwen')}, {machine(result)}", detail, bars)


def norm_kernels() -> Picture:
    """The norms on the H100, over the fastest peer at each point."""
    result = everything()["norms_h100"]
    judged = against_best(wide(result, "us"), norms.is_peer)["ratio"]
    groups = (Group(title, _compared(op), _by_size(judged.loc[op])) for op, title in SHOWN.items())
    return Picture(
        title=f"Norm kernels: our time over the best peer's, {machine(result)}",
        axis="time relative to the fastest peer at each point; shorter is faster",
        baseline="best peer",
        series=SIZES,
        groups=tuple(groups),
        note=f"{WHISKER}, over hidden sizes and tokens. bf16 activations, in CUDA graphs.\n"
        f"Peers: {', '.join(n for n in result.settings.stock if n != 'flashinfer-cuda')}; "
        "bf16 weights, their best case (quack: fp32 gamma). Ours: fp32 gamma.",
    )


def _compared(op: str) -> str:
    several = op.startswith(("rms_norm_add", "qk"))
    return "one launch against the best of several" if several else "one launch against one"


def collectives() -> Picture:
    """All-reduce with norms, over the fastest peer at each point."""
    runs = [everything()[name] for name in all_reduce.PRESENT]
    groups = (
        Group(title, machine(result), _by_size(all_reduce.judged(result).loc[op, "ratio"]))
        for op, title in all_reduce.TITLES.items()
        for result in runs
    )
    return Picture(
        title="All-reduce with norms: our time over the best peer's",
        axis="time relative to the fastest peer at each point; shorter is faster",
        baseline="best peer",
        series=SIZES,
        groups=tuple(groups),
        note=f"{WHISKER}, over hidden sizes and tokens. bf16 activations, in CUDA graphs.\n"
        "Peers: FlashInfer (trtllm), NCCL, torch's symmetric memory, each with the best norm "
        "behind it; NVLink multicast was off.",
    )


def decoding() -> Picture:
    """Decoding in transformers, folded over stock."""
    return Picture(
        title="Decoding in transformers: folded over stock",
        axis="time per token relative to stock; shorter is faster",
        baseline="stock",
        series=("batch 1", "batch 8"),
        groups=tuple(_decoded()),
        note="Gemma 3 1B's shape, random weights, 128 new tokens, greedy. "
        "Line: fastest to slowest run, over stock's median.",
    )


def _decoded() -> Iterator[Group]:
    modes = {"eager": "growing cache, eager", "static": "static cache, reduce-overhead"}
    for result in sorted(results("transformers"), key=lambda result: result.date, reverse=True):
        middle, low, high = (
            wide(result, f"ms_per_token{end}")["folded"] for end in ("", "_min", "_max")
        )
        stock = wide(result, "ms_per_token")["stock"]
        for mode, title in modes.items():
            bars = (
                Bar(*(round(t[mode, batch] / stock[mode, batch], 4) for t in (middle, low, high)))
                for batch in (1, 8)
            )
            detail = f"transformers {result.versions['transformers']}, {result.date}"
            yield Group(f"{title}, {machine(result)}", detail, tuple(bars))


PICTURES: dict[str, Callable[[], Picture]] = {
    "engines.svg": whole_engines,
    "norms.svg": norm_kernels,
    "all_reduce.svg": collectives,
    "decoding.svg": decoding,
}


def stale() -> Iterator[Path]:
    """Files that do not show what they should, and those that nothing here draws."""
    for name, picture in PICTURES.items():
        path = IMAGES / name
        if not path.exists() or plots.recorded(path) != plots.digest(picture()):
            yield path
    yield from (path for path in IMAGES.glob("*") if path.name not in PICTURES)


def draw() -> None:
    """Draw those that are stale, and remove what nothing draws."""
    for path in list(stale()):
        if path.name in PICTURES:
            path.write_text(plots.svg(PICTURES[path.name]()))
        else:
            path.unlink()
