"""Every input that was ever a finding stays refused or read, and each target runs for a while."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import targets
from fuzz.mutate import mutate

from gemma_fold.commands.convert import convert
from gemma_fold.errors import GemmaFoldError

FUZZ = Path(targets.__file__).parent
INPUTS = sorted(
    path
    for kind in ("corpus", "regressions")
    for path in FUZZ.glob(f"{kind}/*/*")
    if path.parent.name in targets.TARGETS
)
RUNS = {"header": 20_000, "config": 20_000, "index": 10_000, "manifest": 3000, "folder": 300}


def name_of(path: Path) -> str:
    return f"{path.parent.parent.name}-{path.parent.name}-{path.name}"


@pytest.mark.parametrize("path", INPUTS, ids=name_of)
def test_stored_inputs(path: Path) -> None:
    targets.TARGETS[path.parent.name](path.read_bytes())


def test_every_target_has_seeds() -> None:
    kept = {path.parent.name for path in INPUTS if path.parent.parent.name == "corpus"}
    assert kept == set(targets.TARGETS) == set(RUNS)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_well_formed_mutations(name: str) -> None:
    """Without atheris: the same mutations, in a fixed order and not guided by coverage."""
    for path in (path for path in INPUTS if path.parent.name == name):
        parts = path.read_bytes().split(targets.SEPARATOR)
        for seed in range(15):
            changed = [mutate(part, seed) or part for part in parts]
            targets.TARGETS[name](targets.SEPARATOR.join(changed))


def test_the_folder_target_reaches_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def note(action: Callable[[], object]) -> None:
        try:
            done.append(type(action()).__name__)
        except GemmaFoldError as error:
            done.append(str(error))

    monkeypatch.setattr(targets, "_refused_or_done", note)
    for path in (path for path in INPUTS if path.parent.name == "folder"):
        targets.folder(path.read_bytes())
    assert done.count("VerifyReport") == 1 and done.count("Inspection") == 2
    assert done.count("ConversionReport") == 2, done  # one folder is unfolded, the other one folded


def test_the_folder_target_notices_a_write_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = next(p for p in INPUTS if p.parent.name == "folder").read_bytes()

    def stray(source: Path, out: Path) -> None:
        (out.parent.parent / "canary" / "stray").touch()

    monkeypatch.setattr(targets, "convert", stray)
    with pytest.raises(targets.Finding, match="outside of OUT"):
        targets.folder(data)
    assert convert is not stray


def test_the_bounds_notice_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(targets.Finding, match="MiB of memory"), targets.bounded(0):
        b"x" * (targets.peak_memory() + 2 * targets.MEMORY)
    monkeypatch.setattr(targets, "SECONDS", 0.2)
    with pytest.raises(targets.Finding, match="processor time"), targets.bounded(0):
        end = time.process_time() + 1.2 * targets.SECONDS
        while time.process_time() < end:
            pass


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed (it has wheels for some systems only): nothing was fuzzed",
)
@pytest.mark.parametrize("name", RUNS)
def test_a_short_run_finds_nothing(name: str, tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    options = ["--runs", str(RUNS[name]), "--seconds", "12", "--json", str(log)]
    command = [sys.executable, "-m", "tests.fuzz.run", name, *options, "--findings", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=FUZZ.parent.parent)
    assert result.returncode == 0, result.stdout + result.stderr + log.read_text()
    assert json.loads(log.read_text())["executions"] > RUNS[name] // 20
