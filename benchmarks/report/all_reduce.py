"""docs/all_reduce.md: all-reduce and norms in one kernel, against peers and against themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from benchmarks.report.frames import (
    DECODE,
    against_best,
    everything,
    geometric_mean,
    results,
    wide,
)
from benchmarks.report.words import folded, machine, provenance, settings, table
from benchmarks.result import OURS, Result

TITLES = {
    "all_reduce_add_rms_norm": "All-reduce, residual add, norm",
    "all_reduce_rms_norm_add_rms_norm": "All-reduce, Gemma's sandwich",
}
#: The runs of the present kernels.
PRESENT = ("all_reduce_h100x2", "all_reduce_h100x4")
FIRST_TWO_SHOT = "all_reduce_first_two_shot_h100x4"


def is_peer(_: str, impl: str) -> bool:
    """Not ours, and not a peer's sum with our norm behind it."""
    return OURS not in impl


def judged(result: Result) -> pd.DataFrame:
    return against_best(wide(result, "us"), is_peer)


def all_reduce() -> str:
    """Each run: a summary, then microseconds of ours and of the best peer."""
    return "\n\n".join(part for name in PRESENT for part in _chapter(everything()[name]))


def _chapter(result: Result) -> Iterator[str]:
    found = judged(result)
    yield f"### {result.machine.count} x {result.machine.device}\n\n{provenance(result)}"
    peers = "; ".join(f"{name}: {how}" for name, how in result.settings.stock.items())
    yield f"Not defaults: {settings(result.settings.both)}. Peers: {peers}."
    yield (
        table(("", "tokens", "points", "geometric mean", "worst", "at"), _summary(found))
        + "\n\nOur time over the best peer's at each point."
    )
    for op, title in TITLES.items():
        cells = found.loc[op].apply(
            lambda r: f"**{r.ours:.2f}**, {r.best:.2f} ({r.which})", axis="columns"
        )
        yield folded(f"{title}, microseconds", _grid(cells, "ours, best peer"))
    times = wide(result, "us")
    ratios = (times[f"{OURS}-portable"] / times[OURS]).dropna()
    yield (
        f"The portable Triton path took {ratios.min():.2f} to {ratios.max():.2f} times the time of "
        f"the default one (geometric mean {geometric_mean(ratios):.2f})."
    )


def _grid(cells: pd.Series, what: str) -> str:
    """Cells by hidden size and tokens: a row for each number of tokens."""
    grid = cells.unstack("hidden")
    header = ("tokens", *(f"H {hidden}: {what}" for hidden in grid))
    return table(header, ((tokens, *row) for tokens, row in grid.iterrows()))


def _summary(found: pd.DataFrame) -> Iterator[tuple[object, ...]]:
    small = found.index.get_level_values("tokens") <= DECODE
    for op, title in TITLES.items():
        for label, part in ((f"up to {DECODE}", found[small]), ("more", found[~small])):
            ratio = part.loc[op, "ratio"]
            hidden, tokens = ratio.idxmax()
            yield (
                *(title, label, len(ratio), f"{geometric_mean(ratio):.2f}"),
                *(f"{ratio.max():.2f}", f"H {hidden}, {tokens} tokens"),
            )


def two_shot() -> str:
    """Ours alone, with the first version of two-shot and with the present one."""
    first = everything()[FIRST_TWO_SHOT]
    before, now = (wide(result, "us")[OURS] for result in (first, everything()[PRESENT[1]]))
    large = before.index.get_level_values("tokens") >= DECODE
    cells = pd.Series(
        [f"{us:.1f}, {now[at]:.1f}" for at, us in before[large].items()], before[large].index
    )
    grid = cells.unstack("tokens")
    header = ("", "H", *(f"{tokens} tokens: first, now" for tokens in grid))
    rows = ((TITLES[op], hidden, *row) for (op, hidden), row in grid.iterrows())
    return f"The first: {provenance(first)}\n\n{table(header, rows)}"


def protocols() -> str:
    """One-shot and two-shot, in turn, for each row length."""
    parts = []
    for result in results("all_reduce_protocols"):
        parts.append(provenance(result))
        cells = wide(result, "us").apply(_both, axis="columns")
        for op, title in TITLES.items():
            parts.append(f"{title}:\n\n{_grid(cells.loc[op], 'one-shot, two-shot')}")
    return "\n\n".join(parts)


def _both(times: pd.Series) -> str:
    """Microseconds of both protocols, the faster one bold."""
    one, two = times["one-shot"], times["two-shot"]
    return f"**{one:.2f}**, {two:.2f}" if one <= two else f"{one:.2f}, **{two:.2f}**"


def stress() -> str:
    """What the long runs found."""
    return "\n".join(
        f"{machine(result)}, commit `{result.commit[:12]}`: {row.values['calls']:,} calls, "
        f"{row.values['different']} results differ, {row.values['seconds']} s.  "
        for result in results("all_reduce_stress")
        for row in result.rows
    )
