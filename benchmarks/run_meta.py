"""What the result of a benchmark says of its run."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def git_commit() -> str:
    """The commit that is checked out, or "unknown"."""
    return _output("git", "rev-parse", "HEAD") or "unknown"


def result_text(meta: dict[str, Any], **lists: list[dict[str, Any]]) -> str:
    """A result file: JSON, one line for each row of each list."""
    parts = [
        f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in lists.items()
    ]
    return f'{{"meta": {json.dumps(meta, indent=1)},\n' + ",\n".join(parts) + "}\n"


def engine_meta(engine: str, world: int) -> dict[str, Any]:
    """The `meta` of a result file of `benchmarks/{engine}.py`, run on `world` GPUs."""
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return {
        "bench": engine,
        "gpu": gpus[0] if gpus else "cpu",
        "world": world,
        "torch": _version("torch"),
        "triton": _version("triton"),
        "peers": {engine: _version(engine), "flashinfer": _version("flashinfer-python")},
        "commit": git_commit(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"benchmarks/{engine}.py", *sys.argv[1:]]),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except FileNotFoundError:
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
