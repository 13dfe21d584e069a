"""Plug-ins in engines that they cannot attach to: the engine goes on, and one line says why.

The engines here are stubs that lack what a real version has; real ones are in tests/engines.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from gemma_fold.commands.convert import convert

ROOT = Path(__file__).resolve().parents[2]

#: Stub packages by engine and case, each a mapping from a file to its text; and what is said.
STUBS = {
    ("vllm", "no internals"): ({"__init__.py": "__version__ = '0.30.0'"}, "vllm.logger"),
    ("vllm", "no version"): (
        {"__init__.py": ""},
        "gemma-fold cannot attach to this version of vLLM",
    ),
    ("vllm", "an import that fails"): (
        {"__init__.py": "raise OSError('libcuda is missing\\nat all')"},
        "libcuda is missing",
    ),
    ("vllm", "too old"): (
        {
            "__init__.py": "__version__ = '0.10.0'",
            "logger.py": "def init_logger(name): ...",
            "platforms.py": "current_platform = None",
            "model_executor/__init__.py": "",
            "model_executor/model_loader/__init__.py": "",
            "model_executor/model_loader/utils.py": "",
            "model_executor/model_loader/base_loader.py": "class BaseModelLoader: ...",
        },
        "vLLM 0.10.0 is too old",
    ),
    ("sglang", "no internals"): ({"__init__.py": "__version__ = '0.5.21'"}, "sglang.srt"),
    ("sglang", "no hooks"): (
        {
            "__init__.py": "",
            "srt/__init__.py": "",
            "srt/plugins/__init__.py": "",
            "srt/plugins/hook_registry.py": "",
        },
        "HookRegistry",
    ),
}


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("registration")
    tiny.build("gemma3_text").save_pretrained(root / "original")
    convert(root / "original", root / "folded")
    return root / "folded"


#: Tried among the fast tests: one of each engine.
FAST = {("vllm", "too old"), ("sglang", "no hooks")}
CASES = [
    pytest.param(*stub, marks=[pytest.mark.slow] if stub not in FAST else []) for stub in STUBS
]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "case"), CASES)
def test_it_says_once_why_and_refuses_folded_checkpoints(
    engine: str, case: str, folded: Path, tmp_path: Path
) -> None:
    files, reason = STUBS[engine, case]
    for name, text in files.items():
        path = tmp_path / engine / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code = (
        f"import gemma_fold.engines.{engine} as plugin\n"
        "plugin.register(); plugin.register()\n"
        "from transformers import AutoConfig\n"
        f"print(AutoConfig.from_pretrained({str(folded.parent / 'original')!r}).model_type)\n"
        f"AutoConfig.from_pretrained({str(folded)!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if "gemma-fold is not attached" in line]
    assert len(said) == 1 and reason in said[0], done.stderr
    assert done.stdout == "gemma3_text\n"
    assert done.stderr.splitlines()[-1].startswith("gemma_fold.errors.HostError: "), done.stderr
    assert said[0].partition(": ")[2] in done.stderr.splitlines()[-1]
