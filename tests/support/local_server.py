"""A server in a process of its own, for as long as a block lasts."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import patience

_START_SECONDS = 300


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str], port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The address of what `command` serves on `port`, once it is healthy; stopped by signal.

    Raises RuntimeError, with its log, if it never is.
    """
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_healthy(process, address, log)
        yield address
    finally:
        process.terminate()
        process.wait(patience.seconds(60))


def wait_until_healthy(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Returns when the server answers; RuntimeError, with its log, if it ends or takes too long."""
    deadline = time.monotonic() + patience.seconds(_START_SECONDS)
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text(errors='replace')}")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=patience.seconds(5)).close()
            return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"no answer in time: {log.read_text(errors='replace')[-4000:]}")
