"""The rules as files: JSON and its schema in the package, and the tables of docs/rules.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from benchmarks.report.words import table
from benchmarks.run import ROOT
from gemma_fold.rules.export import ExportedFamily, ExportedNorm, export, plain_values, schema

_PACKAGE = ROOT / "gemma_fold" / "rules"


def write() -> None:
    """Bring the files in the package up to date."""
    files = {
        _PACKAGE / "rules.json": _json(plain_values(export())),
        _PACKAGE / "rules.schema.json": _json(schema()),
    }
    for path, text in files.items():
        path.write_text(text)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def families() -> str:
    """A table of every family but the plain ones: its norms, and the evidence."""
    header = ("model type", "zero-centred", "plain, though it looks like it", "evidence")
    return table(header, [_cells(each) for each in export().families if each.kind != "plain"])


def _cells(family: ExportedFamily) -> list[str]:
    parts = [
        f"`{part.key}` as `{part.model_type}`" if part.model_type else f"`{part.key}` by its own"
        for part in family.parts
    ]
    found = [_shown(n) for n in family.norms if n.kind in ("zero_centred", "layernorm1p")]
    norms = "; ".join([*found, *parts])
    if family.condition:
        norms = f"if {family.condition}: {norms}"
    return [
        _code((*family.model_types, *family.architectures)),
        f"refused: {family.reason}" if family.reason else norms,
        "; ".join(_shown(n) for n in family.norms if n.kind in ("plain", "input_scaled")),
        f"{family.evidence.how}: {family.evidence.source}",
    ]


def _shown(norm: ExportedNorm) -> str:
    text = f"`{norm.pattern}`"
    if norm.kind == "input_scaled":
        return f"{text} (input scaled)"
    return f"{text} ({norm.fold.offset:.4g} + w)" if norm.fold and norm.fold.offset != 1 else text


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def plain() -> str:
    """Every model type that is plain, by what that rests on."""
    return "\n\n".join(
        f"{family.evidence.how}: {family.evidence.source} ({len(family.model_types)})\n\n"
        f"{_code(sorted(family.model_types))}"
        for family in export().families
        if family.kind == "plain"
    )


def classes() -> str:
    """Norm classes of transformers that add to their weight."""
    rows = [
        (f"`{c.name}`", c.kind, c.fold.add_dtype if c.fold else "", c.evidence.source)
        for c in export().classes
    ]
    return table(("class", "rule", "adds in", "evidence"), rows)
