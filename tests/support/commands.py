"""The command line as a user runs it: a process of its own, or this one where only time differs."""

from __future__ import annotations

import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import patience
import pytest

from gemma_fold.cli import main


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


def run_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same without a process of its own: an error that nobody expects is raised."""
    command = ["gemma-fold", *map(str, arguments)]
    streams = [TextIOWrapper(BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", command)
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            main()
    texts = []
    for stream in streams:
        stream.seek(0)
        texts.append(stream.read())
    assert isinstance(end.value.code, int)
    return subprocess.CompletedProcess(command, end.value.code, *texts)
