"""A real SGLang server in its own processes, on the CPU, and what it says for a prompt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import patience
from local_server import free_port, wait_until_healthy

OPTIONS = (
    "--device=cpu",
    "--skip-tokenizer-init",
    "--cuda-graph-backend-decode=disabled",
    "--cuda-graph-backend-prefill=disabled",
    "--sampling-backend=pytorch",
    "--grammar-backend=none",
    "--skip-server-warmup",
    "--context-length=64",
    "--max-total-tokens=512",
    "--max-running-requests=4",
)
PROMPTS = ((2, 17, 45, 23, 4, 61, 7), (2, 80, 41), (2, *range(5, 25)))
TOKENS = 16


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log: Path

    def post(self, path: str, **body: Any) -> Any:
        """The JSON answer to a JSON request."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=patience.seconds(120)) as answer:
            return json.load(answer)

    def settle(self) -> None:
        """Wait until the scheduler is done with what was answered; updates stop it before."""
        path = f"/flush_cache?timeout={patience.seconds(60):.0f}"
        urllib.request.urlopen(self.url + path, timeout=patience.seconds(120)).close()

    def outputs(
        self, prompts: Sequence[Sequence[int]] = PROMPTS, tokens: int = TOKENS
    ) -> list[list[list[Any]]]:
        """Greedy tokens after each prompt: [logprob, token] of those, and of the prompt's own."""
        found = []
        for prompt in prompts:
            answer = self.post(
                "/generate",
                input_ids=prompt,
                sampling_params={"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
                return_logprob=True,
                logprob_start_len=0,
            )
            meta = answer["meta_info"]
            both = meta["input_token_logprobs"] + meta["output_token_logprobs"]
            found.append([[logprob, token] for logprob, token, _ in both])
        return found


@contextmanager
def started(
    folder: Path,
    log: Path,
    *options: str,
    command: tuple[str, ...] = ("-m", "sglang.launch_server", "--model-path"),
    **environment: str,
) -> Iterator[Server]:
    """A server for the checkpoint in `folder` until the block ends; RuntimeError if it stops."""
    port = free_port()
    arguments = [sys.executable, *command, str(folder), f"--port={port}", *options]
    arguments.append(f"--watchdog-timeout={patience.seconds(300):.0f}")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            arguments,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", log)
        wait_until_healthy(process, server.url, log)
        yield server
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop the server and the processes that it started, which are its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(patience.seconds(30))
