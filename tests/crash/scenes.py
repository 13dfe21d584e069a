"""What is run, from which state of the disk, and what may be there afterwards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints import gemma3_tensors, write_checkpoint

from crash.shim import NO_EXCHANGE, NO_RENAMEAT2, Call
from crash.trees import Tree, remove, tree

OUT = "out"
WORK = f".{OUT}.gemma-fold"

Choose = Callable[[Sequence[Call]], int]


def part(share: float) -> Choose:
    """The call after `share` of all calls."""
    return lambda calls: 1 + int(share * len(calls))


def after(name: str, *, path: str) -> Choose:
    """The call after the last call `name` whose path ends in `path`."""

    def choose(calls: Sequence[Call]) -> int:
        numbers = [
            number
            for number, call in enumerate(calls, 1)
            if call.name == name and call.path.endswith(path)
        ]
        if not numbers:
            raise LookupError(f"no call {name} of {path} among {len(calls)}")
        return numbers[-1] + 1

    return choose


@dataclass(frozen=True)
class Scene:
    """A command in a situation.

    Attributes:
        name: as it is listed.
        arguments: the command under test.
        again: the command that continues it where it left something; empty where itself does.
        wanted: which reference it ends in, "folded" or "unfolded"; empty where that is known.
        old: whether an older checkpoint is at OUT to begin with.
        begun: a command that is killed first, to leave its work folder behind, and where.
        absent: whether OUT may be missing for a moment though something was there, which only
            a file system that cannot exchange two names is an excuse for.
        flags: of the shim.
    """

    name: str
    arguments: tuple[str, ...]
    again: tuple[str, ...] = ()
    wanted: str = "folded"
    old: bool = False
    begun: tuple[tuple[str, ...], Choose] | None = None
    absent: bool = False
    flags: int = field(default=0)


_CONVERT = ("convert", "model", "-o", OUT)
_UNFOLD = ("unfold", "folded", "-o", OUT)
_RESUME = (*_CONVERT, "--resume")
_UNFOLD_RESUME = (*_UNFOLD, "--resume")
_FORCE = (*_CONVERT, "--force")
_FORCE_RESUME = (*_FORCE, "--resume")
_HALFWAY = part(0.6)

SCENES = {
    scene.name: scene
    for scene in (
        Scene("convert", _CONVERT, _RESUME),
        Scene("convert --resume", _RESUME, begun=(_CONVERT, _HALFWAY)),
        Scene("convert --restart", (*_CONVERT, "--restart"), _RESUME, begun=(_CONVERT, _HALFWAY)),
        Scene("convert --force", _FORCE, _FORCE_RESUME, old=True),
        Scene("convert --force --resume", _FORCE_RESUME, old=True, begun=(_FORCE, _HALFWAY)),
        Scene(
            "convert --force --resume after the exchange",
            _FORCE_RESUME,
            old=True,
            begun=(_FORCE, after("exchange", path="/" + OUT)),
        ),
        Scene("unfold", _UNFOLD, _UNFOLD_RESUME, wanted="unfolded"),
        Scene(
            "unfold --resume",
            _UNFOLD_RESUME,
            wanted="unfolded",
            begun=(_UNFOLD, _HALFWAY),
        ),
        Scene("convert without renameat2", _CONVERT, _RESUME, flags=NO_RENAMEAT2),
        Scene(
            "convert --force without exchange",
            _FORCE,
            _FORCE_RESUME,
            old=True,
            absent=True,
            flags=NO_EXCHANGE,
        ),
        Scene(
            "convert --force without renameat2",
            _FORCE,
            _FORCE_RESUME,
            old=True,
            absent=True,
            flags=NO_RENAMEAT2,
        ),
        Scene(
            "convert --force --resume between two renames",
            _FORCE_RESUME,
            old=True,
            absent=True,
            begun=(_FORCE, after("rename", path="/old")),
            flags=NO_EXCHANGE,
        ),
    )
}


class Yard:
    """The folder that OUT is made in, with the sources and much that is nobody's business.

    Attributes:
        folder: the one whose calls are counted.
        stash: where references are kept, out of the commands' sight.
        rest: everything in `folder` that no command may touch.
    """

    def __init__(self, folder: Path, stash: Path) -> None:
        self.folder = folder
        self.stash = stash
        folder.mkdir()
        stash.mkdir()
        source = write_checkpoint(folder / "model", shards=2)
        for path in source.glob("*.safetensors"):  # written with a mode of the library's own
            path.chmod((source / "config.json").stat().st_mode)
        # As in a Hub cache: a file of the source that is a link to somewhere else.
        (folder / "blobs").mkdir()
        shutil.move(source / "tokenizer.json", folder / "blobs" / "tokenizer")
        (source / "tokenizer.json").symlink_to("../blobs/tokenizer")
        write_checkpoint(stash / "model", gemma3_tensors(seed=1), shards=3)
        _leave_canaries(folder)

    def pristine(self) -> None:
        """Remember what must never change; called once the sources are complete."""
        self.rest = tree(self.folder)

    def clean(self, *, old: bool) -> None:
        """Remove what the last trial left, and put the older checkpoint at OUT if wanted."""
        known = {name for name in self.rest if "/" not in name}
        for name in os.listdir(self.folder):
            if name not in known:
                remove(self.folder / name)
        if old:
            shutil.copytree(self.stash / "old", self.folder / OUT, symlinks=True)

    def stray(self) -> Tree:
        """The rest as it is now."""
        return tree(self.folder, without=(OUT, WORK))


def _leave_canaries(folder: Path) -> None:
    """Names close to the ones a command uses, and what links lead to."""
    for name in ("notes", f"{OUT}.partial", f"{OUT}.old", f".{OUT}", f"{OUT}.gemma-fold", "new"):
        (folder / name / "inside").mkdir(parents=True)
        (folder / name / "inside" / "mine.txt").write_text(name)
        (folder / name / "journal").write_text(name)
    for name in (f"{WORK}.txt", f"{OUT}.tmp", ".gemma-fold", "journal"):
        (folder / name).write_text(name)
    (folder / f"{OUT}-link").symlink_to("notes")
    (folder / f"{OUT}-dangling").symlink_to("nowhere")
