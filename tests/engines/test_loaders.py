"""What `docs/reliability.md` says of other tools: complete, without a silent load, and still so.

The tools that are installed here are run again; the others need `tests/loaders/run.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from loaders import run

ROOT = Path(__file__).resolve().parents[2]
ROWS: dict[str, dict[str, Any]] = json.loads(run.RESULTS.read_text())
COLUMNS = ("folded", "tensor_lock_alone")

#: Those that need nothing but what the project installs for itself.
HERE = [
    probe
    for probe, (key, *_) in run.PROBES.items()
    if key in ("transformers", "peft", "accelerate")
]

#: Files beside the probes.
SHARED = {"__init__", "checked", "makers", "plain_model", "probe", "run", "written"}


def test_every_tool_was_run() -> None:
    assert list(ROWS) == list(run.PROBES)
    assert {path.stem for path in run.HERE.glob("*.py")} - SHARED == set(run.PROBES)
    for row in ROWS.values():
        assert row["version"] and row["date"]


@pytest.mark.parametrize("probe", run.PROBES)
def test_nothing_loads_with_other_logits(probe: str) -> None:
    expected = ("loads",) if probe in run.AWARE else ("stops", "writes")
    for column in COLUMNS:
        assert ROWS[probe][column]["outcome"] in expected


@pytest.mark.parametrize("probe", run.PROBES)
def test_what_a_tool_copies_keeps_the_tensor_lock(probe: str) -> None:
    for column in COLUMNS:
        if ROWS[probe][column]["outcome"] == "writes":
            assert "norms [32, 1]" in ROWS[probe][column]["words"]


def test_every_tool_that_does_not_stop_is_named_in_words() -> None:
    words = (ROOT / "docs" / "reliability.md").read_text()
    words = words.partition("<!-- generated: loaders -->")[2].partition("<!-- end -->")[2]
    for row in ROWS.values():
        if any(row[column]["outcome"] != "stops" for column in COLUMNS):
            assert row["tool"] in words


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return run.checkpoints(tmp_path_factory.mktemp("loaders"))


@pytest.mark.slow
@pytest.mark.parametrize("probe", HERE)
def test_tools_that_are_installed_here_do_the_same_today(
    probe: str, live: tuple[Path, Path, Path]
) -> None:
    row = run.row(sys.executable, probe, live)
    assert {name: row[name] for name in COLUMNS} == {name: ROWS[probe][name] for name in COLUMNS}
