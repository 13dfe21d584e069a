"""docs/benchmarks.md, docs/benchmarks_points.md: the linear layers of a few tokens."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.report.frames import results, wide
from benchmarks.report.words import folded, machine, provenance, table
from benchmarks.result import COPY, OURS, STOCK, Result

#: In a decoder layer of a native engine; gate_up is timed by itself beside it.
LAYER = ["qkv", "o", "mlp", "down"]


def linear() -> str:
    """For each run, whole layers."""
    return "\n\n".join(part for result in results("linear") for part in _run(result))


def _run(result: Result) -> Iterator[str]:
    times = wide(result, "us").reset_index()
    tokens = sorted(times["tokens"].unique())
    header = ("model", *(f"{n} token{'s' if n > 1 else ''}" for n in tokens), "of copy, 1 token")
    rows = []
    for model, one in times[times["layer"].isin(LAYER)].groupby("model", sort=False):
        sums = one.groupby("tokens")[[OURS, STOCK, COPY]].sum()
        cells = [_against(at[OURS], at[STOCK]) for _, at in sums.iterrows()]
        share = sums.loc[1, COPY] / 2 / sums.loc[1, OURS]
        rows.append((model, *cells, f"{share:.0%}"))
    yield provenance(result)
    yield table(header, rows)


def weights() -> str:
    """For each run, every weight."""
    return "\n\n".join(
        folded(f"{machine(result)}, {result.date}", _weights(result))
        for result in results("linear")
    )


def _weights(result: Result) -> str:
    times = wide(result, "us").reset_index()
    header = ("model", "layer", "N", "K", "tokens", "ours", "torch", "ours / torch", "half a copy")
    every = [
        (
            *(at["model"], at["layer"], at["n"], at["k"], at["tokens"]),
            *(f"{at[OURS]:.2f}", f"{at[STOCK]:.2f}", f"{at[OURS] / at[STOCK]:.2f}"),
            f"{at[COPY] / 2:.2f}",
        )
        for _, at in times.iterrows()
    ]
    return table(header, every)


def _against(ours: float, torchs: float) -> str:
    return f"{ours:.1f} / {torchs:.1f} = {ours / torchs:.2f}"
