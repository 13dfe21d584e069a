"""The table of docs/reliability.md, from what `tests/loaders/run.py` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from measured import table

RESULTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "loaders.json"
_LOADED = {"loads": "loads, same logits", "differs": "**loads, other logits**"}


def loaders() -> str:
    """One row for each way to load: with both locks, then with the tensor lock alone."""
    found = json.loads(RESULTS.read_text())
    rows = [
        (
            f"{row['tool']} {row['version']}",
            row["call"],
            _outcome(row["folded"]),
            _outcome(row["tensor_lock_alone"]),
        )
        for row in found.values()
    ]
    header = ("tool", "called by", "folded checkpoint", "with the original's config.json put back")
    dates = sorted({row["date"] for row in found.values()})
    return f"{table(header, rows)}\n\nRun {' to '.join(dates[:: max(1, len(dates) - 1)])}."


def _outcome(result: dict[str, Any]) -> str:
    words = result["words"].replace("|", "\\|").replace("`", "'")
    if result["outcome"] == "stops":
        return f"stops: `{words}`"
    if result["outcome"] == "writes":
        return f"copies: writes {words}"
    return _LOADED[result["outcome"]]
