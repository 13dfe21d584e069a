"""What was found of loaders that do not know the format (tests/loaders): no silent one."""

from __future__ import annotations

import json
from pathlib import Path

from loaders.run import PROBES, RESULTS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
FOUND = json.loads(RESULTS.read_text())


def test_every_loader_was_tried() -> None:
    assert list(FOUND) == list(PROBES)


def test_no_loader_takes_a_folded_checkpoint_for_a_model() -> None:
    for column in ("folded", "tensor_lock_alone"):
        assert {row[column]["outcome"] for row in FOUND.values()} <= {"stops", "writes"}


def test_whatever_copies_is_named() -> None:
    text = DOCUMENT.read_text().partition("<!-- end -->\n\nTools that build no model")[2]
    for row in FOUND.values():
        if "writes" in (row["folded"]["outcome"], row["tensor_lock_alone"]["outcome"]):
            assert f"* {row['tool']}" in text, row["tool"]
