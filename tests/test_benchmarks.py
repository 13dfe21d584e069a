"""What benchmarks write is one form, which is read back whole or refused with the reason."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engines, run
from benchmarks.result import RESULTS, ResultError, Settings, load, text

BENCHMARKS = Path(run.__file__).parent
STRESS = RESULTS / "all_reduce_stress_h100x2.json"


@pytest.mark.parametrize("path", sorted(RESULTS.iterdir()), ids=lambda path: path.stem)
def test_committed_results_are_read_and_written_the_same(path: Path) -> None:
    assert text(load(path)) == path.read_text()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda found: found.update(schema=2), "schema is not 1"),
        (lambda found: found.pop("machine"), "machine"),
        (lambda found: found.update(more=1), "more"),
        (lambda found: found.update(machine=[]), "machine|mapping"),
        (lambda found: found["machine"].update(count="2"), "count of Machine is no int"),
        (lambda found: found.update(rows=[]), "no rows"),
        (lambda found: found.update(rows=found["rows"] * 2), "twice"),
        (lambda found: found["rows"][0]["values"].update(us=1), "'us'"),
        (lambda found: found["rows"][0]["values"].update(calls=float("nan")), "calls is neither"),
        (lambda found: found["rows"][0]["values"].update(calls={}), "calls is neither"),
        (lambda found: found["rows"].append({"case": {}, "impl": "", "values": {}}), "not a case"),
        (lambda found: found.update(commit="main; rm"), "no commit"),
        (lambda found: found.update(date="today"), "no date"),
    ],
)
def test_what_is_no_result_is_refused(
    changed: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    found = json.loads(STRESS.read_text())
    changed(found)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(found))
    with pytest.raises(ResultError, match=rf"^changed\.json is no benchmark's result: .*({words})"):
        load(path)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.json"
    for wrong in (STRESS.read_text()[:-3], "[]", "1"):
        path.write_text(wrong)
        with pytest.raises(ResultError, match=r"^half\.json is no benchmark's result: "):
            load(path)


def test_a_command_names_neither_the_commit_nor_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["x", "--rounds", "3", "--commit", "abc1234", "--out=/some/where/a.json", "--portable"]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert re.fullmatch(
        r"torchrun --nproc-per-node 4 -m \S+ --rounds 3 --out benchmarks/results/a.json --portable",
        run.command(),
    )
    monkeypatch.setattr(sys, "argv", ["x", "--commit=abc1234", "--result", "/some/where/b.json"])
    monkeypatch.delenv("WORLD_SIZE")
    assert re.fullmatch(r"python -m \S+ --result benchmarks/results/b.json", run.command())


def test_settings_of_two_engines_are_told_apart() -> None:
    plugin = engines.Plugin("group", "module:function", hidden={"PLUGINS": ""})
    options = {
        "stock": {
            "seed": 0,
            "memory": 0.4,
            "compilation": {"sizes": [1, 2], "passes": {"a": True}},
        },
        "gemma_fold": {"seed": 0, "memory": 0.8, "compilation": {"sizes": [1, 2], "passes": {}}},
    }
    assert engines.settings(
        plugin, {"OFFLINE": "1"}, options, {"stock": {"mode": "3"}}
    ) == Settings(
        both={"seed": 0, "compilation.sizes": [1, 2], "OFFLINE": "1"},
        stock={"memory": 0.4, "compilation.passes.a": True, "PLUGINS": ""},
        ours={"memory": 0.8, "GEMMA_FOLD": "native"},
        chosen={"stock.mode": "3"},
    )


def test_no_benchmark_hides_what_it_times() -> None:
    for path in BENCHMARKS.rglob("*.py"):
        assert path.stem not in ("flashinfer", "liger", "quack", "sglang", "torch", "vllm")
        assert "sys.path" not in path.read_text(), path.name
