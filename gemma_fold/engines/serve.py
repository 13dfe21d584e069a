"""`gemma-fold serve`: an engine's own server that knows folded checkpoints."""

from __future__ import annotations

import importlib.util
import os
import runpy
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gemma_fold.checkpoint.locate import fetch
from gemma_fold.engines.checks import plugin_problem
from gemma_fold.errors import GemmaFoldError, HostError, UsageError
from gemma_fold.format.reader import open_folded

ENGINES = ("auto", "vllm", "sglang", "transformers")
LOCALHOST = "127.0.0.1"


def serve(
    checkpoint: str | os.PathLike[str],
    engine: str = "auto",
    host: str = LOCALHOST,
    port: int = 8000,
    engine_args: Sequence[str] = (),
    starting: Callable[[str], None] = lambda engine: None,
) -> None:
    """Check a folded checkpoint, then serve it over an OpenAI-compatible API until interrupted.

    Args:
        checkpoint: a folder or a Hub id (`org/name[@revision]`), which is downloaded.
        engine: one of ENGINES; "auto" is the first of them that is installed.
        host: the address to listen on.
        port: the port to listen on.
        engine_args: go to the engine's server as they are.
        starting: is told the engine when all was checked.

    Raises:
        UsageError: an unknown engine or argument.
        CheckpointError: not a folded checkpoint, of a later format, or damaged.
        HostError: the engine is not installed, or the port is taken.
    """
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine}: expected one of {', '.join(ENGINES)}")
    engine = _installed() if engine == "auto" else engine
    folder = fetch(checkpoint)[0]
    open_folded(folder)
    _check_port(host, port)
    starting(engine)
    _SERVERS[engine](folder, host, port, engine_args)


def _installed() -> str:
    """The first engine that is installed; if none is, transformers, whose error has advice."""
    return next((name for name in _SERVERS if importlib.util.find_spec(name)), "transformers")


def _check_port(host: str, port: int) -> None:
    """Check that the address is free before a large model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise HostError(
            f"cannot listen on {host}:{port}: {reason}; choose another --host or --port"
        ) from error


def check_plugin(engine: str) -> None:
    """Check that vLLM or SGLang is installed, and will load this package's plug-in.

    Raises:
        HostError: it is not, or will not.
    """
    if importlib.util.find_spec(engine) is None:
        name = {"vllm": "vLLM", "sglang": "SGLang"}[engine]
        raise HostError(
            f"{name} is not installed; install it beside gemma-fold with: pip install {engine}"
        )
    if problem := plugin_problem(engine):
        raise HostError(problem)


@contextmanager
def _command_line(*arguments: str) -> Iterator[None]:
    """Run a server that reads sys.argv, until it is interrupted."""
    before, sys.argv = sys.argv, list(arguments)
    try:
        yield
    except KeyboardInterrupt:
        return  # how a server is stopped
    finally:
        sys.argv = before


def _serve_vllm(folder: Path, host: str, port: int, arguments: Sequence[str]) -> None:
    check_plugin("vllm")
    from vllm.entrypoints.cli.main import main

    address = ("--host", host, "--port", str(port))
    with _command_line("vllm", "serve", str(folder), *address, *arguments):
        try:
            main()
        except SystemExit as error:
            if error.code == 2:  # what argparse gives, after it printed why
                raise UsageError(f"vLLM does not take {' '.join(arguments)}; see above") from error
            raise


def _serve_transformers(folder: Path, host: str, port: int, arguments: Sequence[str]) -> None:
    missing = [n for n in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(n) is None]
    if importlib.util.find_spec("transformers") is None or missing:
        raise HostError(
            "the transformers server is not installed; install it with: "
            "pip install 'gemma-fold[transformers,serve]'"
        )
    import typer
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.cli.serve import Serve

    from gemma_fold.engines.transformers import install

    install()
    # That server looks for models there, and fails requests if there is no such folder.
    with suppress(OSError):
        Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    # Its whole command line would import commands with dependencies that serving does not have.
    app = typer.Typer(add_completion=False)
    app.command(name="serve")(Serve)
    command = [str(folder), "--host", host, "--port", str(port), *arguments]
    try:
        app(command, standalone_mode=False)
    except KeyboardInterrupt:
        return  # how a server is stopped
    except GemmaFoldError:
        raise
    except Exception as error:
        # The command line library of transformers reports wrong arguments this way.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        raise UsageError(f"transformers serve: {message()}") from error


def _serve_sglang(folder: Path, host: str, port: int, arguments: Sequence[str]) -> None:
    check_plugin("sglang")
    command = ["--model-path", str(folder), "--host", host, "--port", str(port), *arguments]
    with _command_line("sglang.launch_server", *command):
        # As the main module: the processes that it starts import it again.
        runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


#: By engine, in the order in which "auto" looks for them.
_SERVERS: dict[str, Callable[[Path, str, int, Sequence[str]], None]] = {
    "vllm": _serve_vllm,
    "sglang": _serve_sglang,
    "transformers": _serve_transformers,
}
