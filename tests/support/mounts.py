"""File systems mounted for as long as a block lasts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[None]:
    """Mount at `folder`; skips the test where that takes rights that there are not."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    answer = subprocess.run(["mount", *arguments, folder], capture_output=True, text=True)
    if answer.returncode:
        pytest.skip(f"mount failed: {answer.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
