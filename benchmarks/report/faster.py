"""docs/faq.md: whether it is faster, engine by engine and size by size."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from benchmarks.report import engines, measurements
from benchmarks.report.frames import results
from benchmarks.report.words import machine, table
from benchmarks.result import Result

#: What of its label each engine is called in a sentence.
NAMES = {"vllm": "vLLM", "sglang": "SGLang"}


def faster() -> str:
    """The extremes in a line for each engine, then a row for each run."""
    runs = list(engines.headline_runs())
    lines = [_engine(name, [run for run in runs if run.what == name]) for name in NAMES]
    lines += [_transformers(mode, how) for mode, how in measurements.MODES.items()]
    columns = sorted({at for run in runs for at in _by_concurrency(run)})
    header = ("engine", "model", "GPUs", *(f"{at} at once" for at in columns))
    rows = (_row(run, columns) for run in runs)
    return "\n".join(lines) + "\n\n" + table(header, rows)


def _engine(name: str, runs: list[Result]) -> str:
    every = pd.concat([engines.ratios(run) for run in runs])
    return f"* **{NAMES[name]}**, native mode: {_extremes(every)}"


def _transformers(mode: str, how: str) -> str:
    every = pd.concat(
        [measurements.speedups(run).loc[mode, "folded"] for run in results("transformers")]
    )
    return f"* **transformers**, {how}: {_extremes(every)}"


def _extremes(ratios: pd.Series) -> str:
    """How many cases took less time than stock, and the slowest and the fastest of them."""
    less = int((ratios < 1).sum())
    return (
        f"less time per token than stock in {less} of {len(ratios)} cases; from "
        f"{_change(ratios.max())} to {_change(ratios.min())}"
    )


def _change(ratio: float) -> str:
    percent = 100 * (1 - ratio)
    return f"{abs(percent):.1f} % {'less' if percent >= 0 else 'more'}"


def _by_concurrency(run: Result) -> Mapping[int, pd.Series]:
    return dict(iter(engines.ratios(run).groupby(level="concurrency")))


def _row(run: Result, columns: list[int]) -> tuple[str, ...]:
    cases = _by_concurrency(run)
    engine = f"{NAMES[run.what]} {run.versions[run.what]}"
    cells = (_cell(cases[at]) if at in cases else "" for at in columns)
    return (engine, engines.shape(run), machine(run), *cells)


def _cell(ratios: pd.Series) -> str:
    """Per cent less time; both ends where lengths of prompts and answers differ."""
    ends = dict.fromkeys(f"{100 * (1 - ratio):.1f}" for ratio in (ratios.max(), ratios.min()))
    return " to ".join(ends)
