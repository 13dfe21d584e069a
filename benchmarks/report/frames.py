"""Results as pandas frames: all of one benchmark, by the names of their files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pandas as pd

from benchmarks.result import OURS, RESULTS, Result, load

#: Tokens up to which a call is a decode step's.
DECODE = 64


@cache
def everything() -> dict[str, Result]:
    """All committed results, by the names of their files."""
    return {path.stem: load(path) for path in sorted(RESULTS.glob("*.json"))}


def results(what: str) -> Iterator[Result]:
    """Those of one benchmark, in the order of their files."""
    return (result for result in everything().values() if result.what == what)


def frame(result: Result) -> pd.DataFrame:
    """One row each: what it is about, its implementation, its values."""
    return pd.DataFrame([{**row.case, "impl": row.impl, **row.values} for row in result.rows])


def wide(result: Result, value: str) -> pd.DataFrame:
    """One value: a row for each case, in their order; a column for each `impl`."""
    found = frame(result).dropna(subset=[value])
    cases = list(result.rows[0].case)
    table = found.set_index([*cases, "impl"])[value].unstack("impl")
    return table.reindex(pd.MultiIndex.from_frame(found[cases].drop_duplicates()))


def against_best(times: pd.DataFrame, is_peer: Callable[[str, str], bool]) -> pd.DataFrame:
    """Ours beside the best peer, wherever there is one.

    Args:
        times: by operator, hidden size and tokens, a column for each implementation.
        is_peer: of (operator, implementation), whether the operator is judged by it.

    Returns:
        `ours`, `best`, `which` it is, and `ratio` of the times, in the order of `times`.
    """
    parts = []
    for op, one in times.groupby(level="op", sort=False):
        peers = one[[name for name in one if is_peer(op, name)]].dropna(how="all")
        if not peers.empty:
            best, which = peers.min(axis=1), peers.idxmin(axis=1)
            ours = one.loc[peers.index, OURS]
            parts.append(pd.DataFrame({"ours": ours, "best": best, "which": which}))
    found = pd.concat(parts)
    return found.assign(ratio=found["ours"] / found["best"])


def geometric_mean(values: pd.Series) -> float:
    return float(np.exp(np.log(values).mean()))
