"""The command line as a user runs it: a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import patience


def run(
    *arguments: str | Path, command: tuple[str, ...] = ("-m", "gemma_fold"), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run python with `command` and `arguments`; output is captured as text."""
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=patience.seconds(120),
        check=False,
        **options,
    )
