"""What the benchmarks of engines share: an engine as it comes beside the same in native mode."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from benchmarks.result import OURS, STOCK, Settings
from benchmarks.run import ROOT

#: NVLink multicast stays off.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "NCCL_NVLS_ENABLE": "0",
    "PYTHONUNBUFFERED": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
NATIVE = {"GEMMA_FOLD": "native"}


@dataclass(frozen=True, slots=True)
class Plugin:
    """By which entry point an engine finds gemma-fold, and the variables that hide it."""

    group: str
    target: str
    hidden: Mapping[str, str]


def environment(
    impl: str, plugin: Plugin, given: Mapping[str, str], work: Path
) -> Mapping[str, str]:
    """The variables of an engine's process, of which `given` are the same for both."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GEMMA_FOLD")} | dict(given)
    if impl == STOCK:
        return {**env, **plugin.hidden}
    env |= {k: v for k, v in os.environ.items() if k.startswith("GEMMA_FOLD_")}
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    if not any(entry.name == "gemma_fold" for entry in entry_points(group=plugin.group)):
        paths.insert(0, str(_installed(plugin, work)))
    return {**env, **NATIVE, "PYTHONPATH": os.pathsep.join(paths)}


def _installed(plugin: Plugin, work: Path) -> Path:
    """A folder with the metadata by which an engine finds gemma-fold where it is not installed."""
    info = work / "site" / "gemma_fold-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gemma-fold\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{plugin.group}]\ngemma_fold = {plugin.target}\n")
    return info.parent


def settings(
    plugin: Plugin,
    given: Mapping[str, str],
    options: Mapping[str, Mapping[str, Any]],
    chosen: Mapping[str, Any] | None = None,
) -> Settings:
    """What both were started with: variables, and `options` by implementation."""
    theirs, own = flat(options[STOCK]), flat(options[OURS])
    both = {name: value for name, value in theirs.items() if own.get(name) == value}
    return Settings(
        both={**both, **given},
        stock={**{k: v for k, v in theirs.items() if k not in both}, **plugin.hidden},
        ours={**{k: v for k, v in own.items() if k not in both}, **NATIVE},
        chosen=flat(chosen or {}),
    )


def flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options within options by their names, joined by dots."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        inner = flat(value) if isinstance(value, dict) else {"": value}
        found |= {f"{name}.{key}".rstrip("."): one for key, one in inner.items()}
    return found


def ended(impl: str, log: Path) -> str:
    """Why a benchmark stops with its engine."""
    last = log.read_text(errors="replace")[-6000:]
    return f"{last}\nthe {impl} engine ended; its log ends above"


@contextmanager
def workplace() -> Iterator[tuple[Path, ExitStack]]:
    """A folder that goes with the run, and what happens at its end, last things first.

    SIGTERM ends the run as Ctrl-C does, so that no engine is left behind.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with (
        tempfile.TemporaryDirectory(prefix="gemma-fold-bench-", ignore_cleanup_errors=True) as name,
        ExitStack() as at_end,
    ):
        yield Path(name), at_end


def stop(process: subprocess.Popen[bytes]) -> None:
    """End an engine, with the processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
