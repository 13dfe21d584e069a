"""A model behind an OpenAI-compatible server in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
from local_server import free_port, running

#: Programs that serve the folder in their first argument: gemma-fold, and transformers alone.
OURS = "import sys; from gemma_fold.engines.serve import serve; serve(sys.argv[1], port={port})"
PLAIN = (
    "import sys, typer; from transformers.cli.serve import Serve; app = typer.Typer(); "
    "app.command()(Serve); app([sys.argv[1], '--host', '127.0.0.1', '--port', '{port}'])"
)


@contextmanager
def server(program: str, folder: Path, log: Path) -> Iterator[openai.OpenAI]:
    """A client of `program`, which serves the checkpoint in `folder`."""
    port = free_port()
    command = [sys.executable, "-c", program.format(port=port), str(folder)]
    with running(command, port, log) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none")
