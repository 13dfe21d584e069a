"""vLLM's own server, in this process."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from gemma_fold.errors import HostError, UsageError

GROUP, NAME = "vllm.general_plugins", "gemma_fold"
_ALLOWED = "VLLM_PLUGINS"


def check_environment() -> None:
    """HostError unless vLLM is installed, and will load this package's plug-in."""
    if importlib.util.find_spec("vllm") is None:
        raise HostError("vLLM is not installed; install it with: pip install vllm")
    if not any(point.name == NAME for point in entry_points(group=GROUP)):
        raise HostError(
            "vLLM finds plug-ins of installed packages only, and gemma-fold is not installed; "
            "install it with pip into the environment of vLLM"
        )
    allowed = os.environ.get(_ALLOWED)
    if allowed is not None and NAME not in allowed.split(","):
        raise HostError(
            f"{_ALLOWED}={allowed} keeps vLLM from loading {NAME}; add it, or unset {_ALLOWED}"
        )


def serve(folder: Path, host: str, port: int, arguments: Sequence[str]) -> None:
    """Run `vllm serve` until it is interrupted.

    Raises HostError where vLLM cannot load folded checkpoints, and UsageError for
    arguments that it does not take.
    """
    check_environment()
    from vllm.entrypoints.cli.main import main

    command = ["serve", str(folder), "--host", host, "--port", str(port), *arguments]
    before, sys.argv = sys.argv, ["vllm", *command]
    try:
        main()
    except KeyboardInterrupt:
        return  # how a server is stopped
    except SystemExit as error:
        if error.code == 2:  # what argparse gives, after it printed why
            raise UsageError(f"vLLM does not take {' '.join(arguments)}; see above") from error
        raise
    finally:
        sys.argv = before
