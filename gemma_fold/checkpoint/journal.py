"""The journal of a work folder: what proves the folder ours, and what a run has finished.

One JSON object a line. The first is the marker with the plan's digest and the names of all files
that the run may write; then one for each finished file, and one before the result is published. A
line torn by a kill ends the journal.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_fold.checkpoint.folder import Folder
from gemma_fold.checkpoint.merge import Merge
from gemma_fold.checkpoint.names import check_name
from gemma_fold.checkpoint.source import FileState
from gemma_fold.errors import CheckpointError

JOURNAL = "journal"
_MARKER = "gemma-fold work folder"
_BEGINNING = json.dumps({"marker": _MARKER}).encode()[:-1]
_MAX_SIZE = 1 << 28  # bytes
_INVALID = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    CheckpointError,
)


@dataclass(frozen=True, slots=True)
class Done:
    """A finished file: what it was then, and the digests that were taken of its source."""

    state: FileState
    digests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Publication:
    """What was about to be published.

    Attributes:
        inode: of the finished folder.
        replaced: state of every file of the folder to be replaced; None if there was none.
    """

    inode: int
    replaced: Mapping[str, FileState] | None


@dataclass(frozen=True, slots=True)
class Entries:
    """A journal that was read."""

    plan: str
    files: frozenset[str] | None  # all that the run may write; None if it does not know
    done: Mapping[str, Done]
    publication: Publication | None
    merge: Merge | None
    size: int  # bytes of whole lines; what follows is a torn one


def read_journal(work: Folder) -> Entries | None:
    """The journal of `work`; None if there is none of ours.

    One that has a second name may be written by another run, so it is not ours.
    """
    raw = _read_own(work, _MAX_SIZE)
    if raw is None or b"\n" not in raw:
        return None
    marker, *lines = raw.splitlines(keepends=True)
    try:
        plan, files = _begun(json.loads(marker))
    except _INVALID:
        return None
    done: dict[str, Done] = {}
    publication, merge, size = None, None, len(marker)
    for line in lines:
        try:
            entry = json.loads(line) if line.endswith(b"\n") else {}
            if "done" in entry:
                done[str(entry["done"])] = _done(entry)
            elif "publish" in entry:
                publication = _publication(entry)
            elif "merge" in entry:
                merge = _merge(entry)
            else:
                break
        except _INVALID:
            break
        size += len(line)
    return Entries(plan, files, done, publication, merge, size)


def is_torn_marker(work: Folder) -> bool:
    """Whether `work` holds nothing but the beginning of a marker: its run died there."""
    if work.names() != [JOURNAL]:
        return False
    raw = _read_own(work, 4096)
    if raw is None or b"\n" in raw:
        return False
    return raw[: len(_BEGINNING)] == _BEGINNING[: len(raw)]


def _read_own(work: Folder, limit: int) -> bytes | None:
    """The journal's first bytes; None if it is not a plain file with one name."""
    status = work.status(JOURNAL)
    if status is None or not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        return None
    with open(work.read(JOURNAL), "rb") as stream:
        return stream.read(limit)


class Journal:
    """A journal being written: each line is on the disk before the next step."""

    def __init__(self, work: Folder, kept: int) -> None:
        """Open it in `work`, keeping the first `kept` bytes; with 0, none may be there."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        if kept == 0:
            flags |= os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(JOURNAL, flags, 0o666, dir_fd=work.descriptor)
        os.ftruncate(self._descriptor, kept)

    def begin(self, plan: str, files: Collection[str] | None) -> None:
        """Write the marker."""
        listed = None if files is None else sorted(files)
        self._record({"marker": _MARKER, "plan": plan, "files": listed})

    def done(self, name: str, done: Done) -> None:
        """Note that `name` is finished and synced."""
        digests = dict(done.digests)
        self._record({"done": name, "state": _state_json(done.state), "digests": digests})

    def publish(self, publication: Publication) -> None:
        """Note what is about to be published, and what it replaces."""
        replaced = publication.replaced
        listed = None if replaced is None else _states_json(replaced)
        self._record({"publish": publication.inode, "replaced": listed})

    def merge(self, merge: Merge) -> None:
        """Note what is about to be moved, and what it replaces."""
        replaced = _states_json(merge.replaced)
        self._record({"merge": merge.into, "written": merge.written, "replaced": replaced})

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _record(self, entry: Mapping[str, Any]) -> None:
        line = memoryview((json.dumps(entry) + "\n").encode())
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)


def _begun(entry: Mapping[str, Any]) -> tuple[str, frozenset[str] | None]:
    if entry["marker"] != _MARKER:
        raise ValueError(entry["marker"])
    files = entry["files"]
    return str(entry["plan"]), None if files is None else frozenset(map(str, files))


def _state_json(state: FileState) -> list[int]:
    return [state.size, state.mtime_ns, state.ctime_ns, state.inode]


def _states_json(states: Mapping[str, FileState]) -> dict[str, list[int]]:
    return {name: _state_json(state) for name, state in states.items()}


def _states(value: Mapping[str, Any]) -> dict[str, FileState]:
    return {name: FileState(*state) for name, state in value.items()}


def _done(entry: Mapping[str, Any]) -> Done:
    digests = {str(part): str(digest) for part, digest in entry["digests"].items()}
    return Done(FileState(*entry["state"]), digests)


def _publication(entry: Mapping[str, Any]) -> Publication:
    replaced = entry["replaced"]
    return Publication(int(entry["publish"]), None if replaced is None else _states(replaced))


def _merge(entry: Mapping[str, Any]) -> Merge:
    written = tuple(check_name(name, JOURNAL) for name in entry["written"])
    return Merge(int(entry["merge"]), written, _states(entry["replaced"]))
