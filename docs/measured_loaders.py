"""Tables of docs/reliability.md and docs/check.md, from what programs in tests/loaders wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from measured import table

_DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
_LOADED = {"loads": "loads, same logits", "differs": "**loads, other logits**"}


def loaders() -> str:
    """One row for each way to load: with both locks, then with the tensor lock alone."""
    found = json.loads((_DATA / "loaders.json").read_text())
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
    return f"{table(header, rows)}\n\n{_when(found)}"


def checked() -> str:
    """One row for each file that a real tool wrote: what `check` says of it."""
    found = json.loads((_DATA / "checked.json").read_text())
    rows = [(row["tool"], row["call"], row["line"]) for row in found.values()]
    return f"{table(('tool', 'called by', 'verdict'), rows)}\n\n{_when(found)}"


def _when(found: dict[str, Any]) -> str:
    dates = sorted({row["date"] for row in found.values()})
    return f"Run {' to '.join(dates[:: max(1, len(dates) - 1)])}."


def _outcome(result: dict[str, Any]) -> str:
    words = result["words"].replace("|", "\\|").replace("`", "'")
    if result["outcome"] == "stops":
        return f"stops: `{words}`"
    if result["outcome"] == "writes":
        return f"copies: writes {words}"
    return _LOADED[result["outcome"]]
