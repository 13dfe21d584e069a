"""docs/vllm.md, docs/sglang.md and the README: engines as they come, and in native mode."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pandas as pd

from benchmarks.report.frames import everything, frame, geometric_mean, results, wide
from benchmarks.report.words import folded, machine, not_defaults, provenance, settings, table
from benchmarks.result import OURS, STOCK, Result
from benchmarks.sglang_load import MEASURES

#: Kinds of work in a decode step, by what their kernels' names hold; the first that fits counts.
KINDS = {
    "all-reduce with what is fused into it": ("allreduce", "one_shot", "two_shot"),
    "matrix products": ("nvjet", "splitK", "gemm"),
    "attention and its cache": ("flash", "reshape_and_cache"),
}
REST = "norms, activations, rotary embedding and the rest"
FUSION = "compilation_config.pass_config.fuse_allreduce_rms"
OPEN = "Every setting that is not the engine's default"


def headline_runs() -> list[Result]:
    """The runs of whole engines: newest first, then by the number of GPUs and the model."""
    runs = sorted((*results("sglang"), *results("vllm")), key=_place)
    return sorted(runs, key=lambda result: result.date, reverse=True)


def _place(result: Result) -> tuple[int, list[int]]:
    model = str(result.rows[0].case["model"])
    return result.machine.count, [int(number) for number in re.findall(r"\d+", model)]


def ratios(result: Result) -> pd.Series:
    """Time per output token, native mode over stock, at each load; medians where repeated."""
    times = wide(result, "ms_per_token")
    if "repeat" in times.index.names:
        loads = [name for name in times.index.names if name != "repeat"]
        times = times.groupby(level=loads, sort=False, dropna=False).median()
    return times[OURS] / times[STOCK]


def at_once(result: Result) -> tuple[int, int]:
    """The fewest and the most requests at once of a run."""
    loads = [int(row.case["concurrency"]) for row in result.rows]
    return min(loads), max(loads)


def ratios_at(result: Result, load: int) -> pd.Series:
    """`ratios`, at so many requests at once."""
    found = ratios(result)
    return found[found.index.get_level_values("concurrency") == load]


def shape(result: Result) -> str:
    """The model of a run, and how it differs from the whole of it, compiled."""
    case = result.rows[0].case
    eager = ", eager" if case.get("eager") else ""
    return f"{case['model']}{eager}" + (f", {case['layers']} layers" if case["layers"] else "")


def fusion(result: Result) -> str:
    """Whether the engine's own fusion of all-reduce and norm ran, in both modes where it did."""
    if result.machine.count == 1:
        return "one GPU"
    both = result.settings.both
    off = "--enforce-disable-flashinfer-allreduce-fusion" in both
    return "off" if off or both.get(FUSION) is False else "on"


def headline() -> str:
    """How much less time an output token takes: one line for each run; then the settings."""
    rows = []
    for result in headline_runs():
        saved, (fewest, most) = 100 - 100 * ratios(result), at_once(result)
        busiest = 100 - 100 * geometric_mean(ratios_at(result, most))
        engine = f"{result.what} {result.versions[result.what]}"
        percent = f"{saved.min():.1f} to {saved.max():.1f} %"
        setup = (engine, shape(result), machine(result), fusion(result))
        rows.append((*setup, f"{fewest} to {most}", percent, f"{busiest:.1f} %"))
    header = (
        *("engine", "shape, random weights", "GPUs", "the engine's own all-reduce fusion"),
        *("requests at once", "less time per output token", "at the most requests"),
    )
    return f"{table(header, rows)}\n\n{folded(OPEN + ', in all of these runs', _all_settings())}"


def _all_settings() -> str:
    """Of each engine what all its runs share, and what each has beside that."""
    lines = []
    for engine in ("sglang", "vllm"):
        runs = [run for run in headline_runs() if run.what == engine]
        shared = {
            name: value
            for name, value in runs[0].settings.both.items()
            if all(run.settings.both.get(name) == value for run in runs)
        }
        first = runs[0].settings
        lines.append(
            f"* {engine}, both sides: {settings(shared)}. Without gemma-fold: "
            f"{settings(first.stock)}. With it: {settings(first.ours)}."
        )
        alike: dict[str, list[str]] = {}
        for run in runs:
            own = {name: v for name, v in run.settings.both.items() if name not in shared}
            alike.setdefault(settings(own), []).append(f"{shape(run)} on {machine(run)}")
        lines += [f"    * {'; '.join(at)}: {own}." for own, at in alike.items() if own]
    return "\n".join(lines)


def sglang() -> str:
    """SGLang's server as it comes, and with native mode."""
    header = ("in/out", "requests at once", "", "stock", "native", "native / stock")
    return "\n\n".join(
        f"{shape(result)} with random weights. {provenance(result)}\n\n"
        f"{table(header, _served(result))}\n\n{folded(OPEN, not_defaults(result))}"
        for result in results("sglang")
    )


def _served(result: Result) -> Iterator[tuple[object, ...]]:
    """Medians over the repeats."""
    loads = ["input", "output", "concurrency"]
    medians = frame(result).groupby([*loads, "impl"])[list(MEASURES)].median()
    for (prompt, new, at_once), one in medians.groupby(level=loads):
        for measure, title in MEASURES.items():
            stock, ours = (one.loc[(prompt, new, at_once, impl), measure] for impl in (STOCK, OURS))
            title += ", 99th percentile" if measure.endswith("_p99") else ""
            values = f"{stock:.1f}", f"{ours:.1f}", f"{ours / stock:.3f}"
            yield f"{prompt}/{new}", at_once, title, *values


def vllm() -> str:
    """Time per output token, stock against native mode; and where a decode step's time goes."""
    profiles = {name.removesuffix("_profile"): found for name, found in everything().items()}
    parts = []
    for name, result in everything().items():
        if result.what == "vllm":
            parts += [f"{shape(result)} with random weights. {provenance(result)}", _timed(result)]
            parts.append(folded(OPEN, not_defaults(result)))
            if profiles[name].what == "vllm_profile":
                parts.append(_profile(profiles[name]))
    return "\n\n".join(parts)


def _timed(result: Result) -> str:
    times, speeds = wide(result, "ms_per_token"), wide(result, "tokens_per_s")
    names = times.index.names
    rows = []
    for at, row in times.iterrows():
        case, speed = dict(zip(names, at, strict=True)), speeds.loc[at]
        rows.append(
            (
                *("eager" if case["eager"] else "compiled, CUDA graphs",),
                *(f"{case['input']}/{case['output']}", case["concurrency"]),
                *(f"{row[STOCK]:.2f}", f"{row[OURS]:.2f}", f"{row[OURS] / row[STOCK]:.3f}"),
                f"{speed[STOCK]:.0f}, {speed[OURS]:.0f}",
            )
        )
    header = (
        *("mode", "in/out", "requests at once", "stock, ms a token", "native, ms a token"),
        *("native / stock", "tokens/s"),
    )
    return table(header, rows)


def _kind(kernel: str) -> str:
    if kernel == "linear":  # ours; Inductor's kernels hold the word, too
        return "matrix products"
    return next((k for k, marks in KINDS.items() if any(m in kernel for m in marks)), REST)


def _profile(result: Result) -> str:
    found = frame(result)
    kinds = found["kernel"].map(_kind)
    totals = found.groupby([kinds, "impl"])[["us", "launches"]].sum()
    cells = totals.apply(lambda t: f"{t.us:.0f} in {t.launches:.0f}", axis="columns").unstack()
    there = [kind for kind in (*KINDS, REST) if kind in cells.index]
    rows = [(kind, *cells.loc[kind, [STOCK, OURS]]) for kind in there]
    return (
        f"Where a decode step's time goes at concurrency {found['concurrency'].iloc[0]}, from the "
        "profiler: microseconds of kernels, and their number. A kernel that starts before the one "
        "ahead of it has ended counts its wait, so native mode's add up to more than a step.\n\n"
        + table(("", "stock", "native"), rows)
    )
