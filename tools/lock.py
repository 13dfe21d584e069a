"""Write every lock file anew: what a fresh resolution gives today.

    python tools/lock.py [FILE ...]

Each is resolved in a temporary environment. Comments stay: those at the head of a file, and those
above a pin for as long as there is that pin.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from environments import LOCKS, ROOT, created, last_words, name


def pins(frozen: str) -> list[str]:
    """Those that `pip freeze` lists, less what a GPU's torch brings, in one order."""
    lines = [line.removesuffix("+cpu") for line in frozen.splitlines()]
    kept = [line for line in lines if "==" in line and not line.startswith("nvidia")]
    return sorted(kept, key=str.lower)


def with_notes(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """`new` pins with the comments of the `old` file, each above the pin it stood above."""
    head: list[str] = []
    notes: dict[str, list[str]] = {}
    waiting: list[str] = []
    for line in old:
        if line.startswith("#"):
            waiting.append(line)
        elif not line.strip():
            # A block of comments before an empty line belongs to the file, not to a pin.
            head += [*waiting, ""] if waiting else []
            waiting = []
        else:
            notes[name(line)] = waiting
            waiting = []
    return [*head, *(text for pin in new for text in (*notes.get(name(pin), ()), pin)), *waiting]


def lock(file: str) -> None:
    """Write one lock file; it stays as it is where its packages cannot be installed."""
    with tempfile.TemporaryDirectory() as folder:
        python = created(Path(folder) / "environment")
        LOCKS[file](python)
        frozen = python.run("-m", "pip", "freeze", "--exclude", "gemma-fold")
    path = ROOT / file
    path.write_text("\n".join(with_notes(path.read_text().splitlines(), pins(frozen))) + "\n")


def main(arguments: Sequence[str]) -> int:
    unknown = [file for file in arguments if file not in LOCKS]
    if unknown:
        print(f"no lock file {unknown[0]}; there are {', '.join(LOCKS)}", file=sys.stderr)
        return 2
    for file in arguments or LOCKS:
        print(f"resolving {file}", flush=True)
        try:
            lock(file)
        except subprocess.CalledProcessError as error:
            print(f"{file} is as it was: {last_words(error)}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
