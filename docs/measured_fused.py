"""The table of docs/compatibility.md, from what `tests/support/fused_counts.py` wrote."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from measured import table

RESULTS = Path(__file__).resolve().parent.parent / "tests" / "data" / "fused.json"


def fused() -> str:
    """One row for each version, one column for each family of its engine."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in json.loads(RESULTS.read_text()):
        found[row["engine"]][row["version"]].append(row)
    return "\n\n".join(_engine(engine, versions) for engine, versions in found.items())


def _engine(engine: str, versions: dict[str, list[dict[str, Any]]]) -> str:
    families = list(dict.fromkeys(row["family"] for rows in versions.values() for row in rows))
    lines = []
    for version, rows in versions.items():
        cells = {row["family"]: f"{row['fused']} of {row['expected']}" for row in rows}
        levels = ", ".join(sorted({row["level"] for row in rows}))
        lines.append([version, *(cells.get(family, "not there") for family in families), levels])
    return table((engine, *families, "level"), lines)
