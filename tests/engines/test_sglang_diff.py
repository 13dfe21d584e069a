"""`gemma-fold diff --engine sglang`, with SGLang itself on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import uuid
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import patience
import psutil
import pytest
from commands import run_here
from safetensors.torch import load_file, save_file

from gemma_fold.commands.convert import convert
from gemma_fold.compare.outputs import engines, sglang

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is in an environment of its own", allow_module_level=True)

from sglang_checkpoints import Checkpoints

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

DIFF = ("-m", "gemma_fold", "diff")
OPTIONS = ("--engine", "sglang", "--json")


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process that leaves none of its own behind."""
    mark = uuid.uuid4().hex
    env = {k: v for k, v in os.environ.items() if not k.startswith("GEMMA_FOLD")}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**env, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MARK": mark, **environment},
        capture_output=True,
        text=True,
        timeout=patience.seconds(900),
    )
    assert processes_with(mark) == []
    return done


def processes_with(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue  # it ended meanwhile
    return found


def check_same(found: Any, positions: int) -> None:
    outputs = found["outputs"]
    stats = outputs["stats"]
    assert stats["positions"] >= positions
    assert stats["positions_differing"] == 0 and stats["max_abs"] == 0
    assert len(outputs["greedy"]) == 4
    assert all(one["diverges_at"] is None for one in outputs["greedy"])
    assert len({one["a"] for one in outputs["greedy"]}) == 4
    assert outputs["engines"] == ["sglang, bfloat16 on cpu"] * 2
    # What was decoded is what was read, and in bf16 not to the last bit.
    assert outputs["floor"]["kl_ab"]["mean"] < 0.01 and outputs["floor"]["same_top"] > 0.9
    assert found["environment"]["sglang"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short one for the real model."""
    file = tmp_path_factory.mktemp("text") / "text"
    file.write_text(
        files("gemma_fold.compare.outputs").joinpath("text.txt").read_text("utf-8")[:1500]
    )
    return file


def test_a_script_compares_though_it_guards_nothing(
    real_270m: Path, folded_270m: Path, text: Path, tmp_path: Path
) -> None:
    """Processes that SGLang starts import the main module again, which would compare again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, pathlib, sys; import gemma_fold\n"
        "from gemma_fold.compare.report import writers\n"
        "a, b, text = sys.argv[1:]\n"
        "options = gemma_fold.DiffOptions(\n"
        "    engines=('sglang',), text=pathlib.Path(text), new_tokens=16\n"
        ")\n"
        "print(json.dumps(writers.to_json(gemma_fold.diff(a, b, options))))\n"
    )
    done = run(script, real_270m, folded_270m, text)
    assert done.returncode == 0, done.stderr[-4000:]
    check_same(json.loads(done.stdout), positions=200)


def test_the_real_270m(real_270m: Path, folded_270m: Path, text: Path) -> None:
    options = (*OPTIONS, "--text", text, "--new-tokens", "16")
    done = run(*DIFF, real_270m, folded_270m, *options, GEMMA_FOLD="native")
    assert done.returncode == 0, done.stderr[-4000:]
    check_same(json.loads(done.stdout), positions=200)


def test_other_weights_differ_and_the_original_runs_sglang_and_not_gemma_fold(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where GEMMA_FOLD asks for native mode, which would fold the original as it loads."""
    monkeypatch.setenv("GEMMA_FOLD", "native")
    given = []

    def watched(*arguments: Any) -> Any:
        backend = sglang.start(*arguments)
        children = psutil.Process().children(recursive=True)
        given.append({child.environ().get("GEMMA_FOLD") for child in children})
        return backend

    started = replace(engines.ENGINES["sglang"], start=watched)
    monkeypatch.setitem(engines.ENGINES, "sglang", started)
    a, b = checkpoints.original("gemma3_text"), checkpoints.folded("gemma3_text", 1)
    done = run_here("diff", a, b, *OPTIONS, "--no-noise-floor", "--prompts", "1")
    assert done.returncode == 1, done.stderr[-4000:]
    stats = json.loads(done.stdout)["outputs"]["stats"]
    assert stats["positions_differing"] == stats["positions"] >= 3 * 62
    assert stats["kl_ab"]["mean"] > 1e-4
    assert given[0] == {None} and "native" in given[1]


def test_what_sglang_does_not_load_is_one_line(checkpoints: Checkpoints, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    convert(checkpoints.original("gemma3_text"), broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    done = run(*DIFF, broken, broken, *OPTIONS)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr[-4000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"gemma-fold: SGLang does not run {broken} ({broken} gives no gamma for")
    assert last.endswith("its log is above, and --no-outputs compares weights alone")


def test_a_mode_there_is_not_is_told_at_once(checkpoints: Checkpoints) -> None:
    folder = checkpoints.original("gemma3_text")
    done = run(*DIFF, folder, folder, *OPTIONS, GEMMA_FOLD="nativ")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("gemma-fold: invalid GEMMA_FOLD='nativ': expected .*\n", done.stderr)
