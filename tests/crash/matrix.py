"""The driver: started once under the preloaded shim, it forks for every trial.

    LD_PRELOAD=shim.so python -m crash.matrix FOLDER [--scene NAME]... [--fault NAME]... \\
        [--every N] [--kills N] [--errors N] [--json FILE]

prints the cells with their counts of trials, and exits with 1 where a trial found a problem. With
--calls it lists the calls of the undisturbed commands instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

from checkpoints import write_checkpoint

from crash.scenes import OUT, SCENES, Scene, Yard
from crash.shim import FAULTS, KILL, SKIP_SYNC, TORN, Call, Fault, control
from crash.trees import tree
from crash.trials import Bench, Trial, fitting


def command_line(arguments: tuple[str, ...]) -> int:
    """Run gemma-fold's command line in this process."""
    from gemma_fold import cli

    sys.argv = ["gemma-fold", *arguments]
    cli.main()
    return 0


def _warm_up(folder: Path) -> None:
    """Do everything once in this process, so that no trial has to import what it needs."""
    write_checkpoint(folder / "warm")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for arguments in (
            ("convert", "warm", "-o", "there"),
            ("unfold", "there", "-o", "back"),
            ("convert", "warm", "-o", "there"),
            ("convert", "--no-such-option"),
        ):
            with suppress(SystemExit):
                command_line(arguments)


def set_up(folder: Path) -> Bench:
    """A yard in `folder` with the references that the commands make when nothing fails."""
    os.chdir(folder)
    _warm_up(folder)
    yard = Yard(folder / "yard", folder / "stash")
    os.chdir(yard.folder)
    bench = Bench(yard, control(), command_line, flags=SKIP_SYNC)
    yard.pristine()
    targets = {"model": yard.folder / "folded", "../stash/model": yard.stash / "old"}
    for source, target in targets.items():
        ending = bench.run(("convert", source, "-o", OUT))
        assert ending.code == 0, ending
        shutil.move(yard.folder / OUT, target)
    yard.pristine()
    bench.references = {"new": {}, "old": tree(yard.stash / "old")}
    return bench


@dataclass(frozen=True)
class Sieve:
    """Which trials are played.

    Attributes:
        every: each how many-th of the calls that only look.
        kills: each how many-th of the kills.
        errors: each how many-th of the errors; other calls for other faults.
    """

    every: int
    kills: int
    errors: int

    def pick(self, calls: list[Call], fault: Fault) -> list[int]:
        """Numbers of the calls that get this fault."""
        thin = self.kills if fault.kind in (KILL, TORN) else self.errors
        return fitting(calls, fault, self.every)[[*FAULTS].index(fault.name) % thin :: thin]


def play(bench: Bench, scenes: list[Scene], faults: list[str], sieve: Sieve) -> list[Trial]:
    """The trials of these scenes with these faults."""
    yard = bench.yard
    trials = []
    for scene in scenes:
        calls = _calls(bench, scene)
        for fault in (FAULTS[name] for name in faults):
            for number in sieve.pick(calls, fault):
                trials.append(bench.trial(scene, number, fault))
    yard.clean(old=False)
    return trials


def _calls(bench: Bench, scene: Scene) -> list[Call]:
    if scene.wanted:
        bench.references["new"] = reference(bench.yard, scene.wanted)
    return bench.calls(scene)


def reference(yard: Yard, wanted: str) -> dict[str, tuple[str, ...]]:
    """What a scene has to end in; a source's link is a plain file in the copy."""
    found = tree(yard.folder / ("folded" if wanted == "folded" else "model"))
    if wanted == "unfolded":
        found["tokenizer.json"] = tree(yard.folder / "blobs")["tokenizer"]
    return found


def report(trials: list[Trial], folder: Path, seconds: float) -> dict[str, object]:
    """Counts of trials by command and fault, and every trial that found a problem."""
    cells = Counter((trial.scene, trial.fault) for trial in trials)
    calls = {(t.scene, t.number) for t in trials}
    return {
        "file_system": file_system(folder),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _commit(),
        "seconds": round(seconds, 1),
        "trials": len(trials),
        "cells": len(cells),
        "calls": dict(Counter(scene for scene, _ in sorted(calls))),
        "counts": {
            scene: {fault: n for (s, fault), n in cells.items() if s == scene}
            for scene in dict.fromkeys(scene for scene, _ in cells)
        },
        "failures": [str(trial) for trial in trials if trial.problems],
    }


def file_system(folder: Path) -> str:
    """The kind of file system that `folder` is on, by the mount table."""
    found = ("", "unknown")
    for fields in map(str.split, Path("/proc/self/mountinfo").read_text().splitlines()):
        if folder.is_relative_to(fields[4]) and len(fields[4]) >= len(found[0]):
            found = (fields[4], fields[fields.index("-") + 1])
    return found[1]


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Play the scenes and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scene", action="append", choices=SCENES)
    parser.add_argument("--save", action="store_true", help="save_pretrained instead")
    parser.add_argument("--fault", action="append", choices=FAULTS)
    parser.add_argument("--every", type=int, default=1, help="of the calls that only look")
    parser.add_argument("--kills", type=int, default=1, help="play each N-th of them")
    parser.add_argument("--errors", type=int, default=1, help="play each N-th of them")
    parser.add_argument("--calls", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="crash-") as folder:
        path = Path(folder).resolve()
        begin = time.monotonic()
        faults = given.fault or [*FAULTS]
        scenes = [SCENES[name] for name in given.scene or SCENES]
        bench: Bench
        if given.save:
            from crash import saving  # torch and transformers

            bench, scenes = saving.set_up(path), [*saving.SCENES.values()]
        else:
            bench = set_up(path)
        if given.calls:
            for call in (call for scene in scenes for call in _calls(bench, scene)):
                print(call.name, call.bits, call.path, sep="\t")
            os.chdir("/")
            return
        trials = play(bench, scenes, faults, Sieve(given.every, given.kills, given.errors))
        found = report(trials, path, time.monotonic() - begin)
        os.chdir("/")
    text = json.dumps(found, indent=1)
    if given.json:
        given.json.write_text(text + "\n")
    print(text)
    sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    main()
