"""What a result says of the run that made it, and the options that every benchmark has."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.result import UNKNOWN, Machine, Result, Row, Settings, text

ROOT = Path(__file__).resolve().parent.parent
#: What is installed under another name.
PACKAGES = {
    "flashinfer": "flashinfer-python",
    "quack": "quack-kernels",
    "liger": "liger-kernel",
    "cutlass-dsl": "nvidia-cutlass-dsl",
}


def add_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """`--out`, where the result goes, and `--commit`."""
    parser.add_argument(
        "--out", "--result", type=Path, required=required, help="where to write the result, JSON"
    )
    parser.add_argument(
        "--commit", default=checked_out(), help="what ran, where .git does not travel along"
    )


def write(
    args: argparse.Namespace,
    what: str,
    *,
    machine: Machine,
    versions: dict[str, str],
    settings: Settings,
    measures: dict[str, str],
    rows: list[Row],
    out: Path | None = None,
) -> None:
    """Write the result of a run with these options to `--out`, or to `out`."""
    path = out or args.out
    found = Result(
        what=what,
        machine=machine,
        versions=versions,
        commit=args.commit,
        date=datetime.date.today().isoformat(),
        command=command(),
        settings=settings,
        measures=measures,
        rows=tuple(rows),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(found))


def command() -> str:
    """What repeats this run from the repository's root, whatever folder it wrote to."""
    spec = sys.modules["__main__"].__spec__
    module = Path(sys.argv[0]).name if spec is None else spec.name
    ranks = os.environ.get("WORLD_SIZE")
    launcher = f"torchrun --nproc-per-node {ranks} -m" if ranks else "python -m"
    kept, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        name, given, value = argument.partition("=")
        if name not in ("--commit", "--logs", "--out", "--result"):
            kept.append(argument)
            continue
        value = value if given else next(arguments, "")
        if name in ("--out", "--result"):
            kept += [name, f"benchmarks/results/{Path(value).name}"]
    return " ".join([launcher, module, *kept])


def checked_out() -> str:
    """The commit, with -dirty where files differ from it, or "unknown"."""
    return output("git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40") or UNKNOWN


def gpus(count: int) -> Machine:
    """`count` of this machine's GPUs; its processor where it has none."""
    names = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return Machine(names[0], count) if names else Machine("CPU", 1)


def versions(*names: str) -> dict[str, str]:
    """Of Python, and of those that are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        module = sys.modules.get(name)  # knows what it was built for, unlike its package
        try:
            found[name] = getattr(module, "__version__", None) or version(PACKAGES.get(name, name))
        except PackageNotFoundError:
            continue
    return found


def output(*words: str) -> str:
    """What a command prints, run in the repository's root; nothing where there is no such one."""
    try:
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except FileNotFoundError:
        return ""
