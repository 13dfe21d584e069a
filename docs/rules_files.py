"""The rules as files: JSON and its schema in the package, and the tables of `rules.md`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gemma_fold.rules.export import ExportedFamily, ExportedNorm, export, plain_values, schema

_PACKAGE = Path(__file__).resolve().parent.parent / "gemma_fold" / "rules"


def packaged() -> dict[Path, str]:
    """What `make docs` writes into the package."""
    return {
        _PACKAGE / "rules.json": _json(plain_values(export())),
        _PACKAGE / "rules.schema.json": _json(schema()),
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def families() -> str:
    """A table of every family but the plain ones: its norms, and the evidence."""
    lines = [
        "| model type | zero-centred | plain, though it looks like it | evidence |",
        "|---" * 4 + "|",
    ]
    for family in export().families:
        if family.kind != "plain":
            lines.append(f"| {' | '.join(_cells(family))} |")
    return "\n".join(lines)


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
    lines = ["| class | rule | adds in | evidence |", "|---" * 4 + "|"]
    for each in export().classes:
        added = each.fold.add_dtype if each.fold else ""
        lines.append(f"| `{each.name}` | {each.kind} | {added} | {each.evidence.source} |")
    return "\n".join(lines)
