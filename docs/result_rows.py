"""What tables and plots need of a committed result: its rows by point, and where it comes from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

OURS = "gemma_fold"
Times = dict[tuple[str, int, int], dict[str, float]]  # (op, hidden, tokens) -> impl -> us


def grouped(rows: Iterable[dict[str, Any]]) -> Times:
    """Microseconds by operator, hidden size and tokens, then by implementation."""
    found: Times = defaultdict(dict)
    for row in rows:
        found[row["op"], row["hidden"], row["tokens"]][row["impl"]] = row["us"]
    return found


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def peers_of(meta: dict[str, Any]) -> str:
    """The peers of a run with their versions."""
    return ", ".join(f"{name} {version}" for name, version in meta["peers"].items())


def run_of(meta: dict[str, Any]) -> str:
    """When a run was made, from what, and how."""
    note = f" {meta['note']}" if "note" in meta else ""
    return f"{meta['date']}, commit `{meta['commit'][:12]}`, `{meta['command']}`.{note}"
