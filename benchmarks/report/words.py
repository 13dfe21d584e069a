"""Markdown: tables, and what is said of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.result import Result


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def folded(title: str, text: str) -> str:
    """What a reader opens."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def machine(result: Result) -> str:
    """Its device, without the words that every GPU's name has, and how many."""
    return f"{result.machine.count} x {short(result.machine.device)}"


def short(device: str) -> str:
    """A GPU's name without what does not tell it from others."""
    return device.removeprefix("NVIDIA ").split(" ")[0]


def provenance(result: Result) -> str:
    """Where, with what, when, from what and how a run was made."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    note = f" {result.note}" if result.note else ""
    return (
        f"{result.machine.count} x {result.machine.device}; {versions}; {result.date[:10]}, "
        f"commit `{result.commit[:12]}`, `{result.command}`.{note}"
    )


def settings(options: Mapping[str, Any]) -> str:
    """Options and variables as they are given, in a line."""
    return ", ".join(f"`{_given(name, value)}`" for name, value in options.items())


def _given(name: str, value: Any) -> str:
    if value is True and name.startswith("--"):
        return name
    return f"{name}={value if isinstance(value, str) else json.dumps(value)}"


def not_defaults(result: Result) -> str:
    """Every setting of a comparison of two engines that was not left at its default."""
    found = result.settings
    sides = {"Both sides": found.both, "Stock alone": found.stock, "Ours alone": found.ours}
    return " ".join(f"{side}: {settings(given)}." for side, given in sides.items() if given)
