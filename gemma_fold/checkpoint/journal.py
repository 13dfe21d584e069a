"""The journal of a work folder: what proves the folder ours, and what a run has finished.

One JSON object a line. The first is the marker with the plan's digest; then one for each finished
file, and one before the result is published. A line torn by a kill ends the journal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_fold.checkpoint.folder import Folder
from gemma_fold.checkpoint.source import FileState

JOURNAL = "journal"
_MARKER = "gemma-fold work folder"
_BEGINNING = json.dumps({"marker": _MARKER}).encode()[:-1]
_MAX_SIZE = 1 << 30  # bytes


@dataclass(frozen=True, slots=True)
class Done:
    """A finished file: its size, and the digests that were taken of its source."""

    size: int
    digests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Publication:
    """What was about to be published.

    Attributes:
        inode: of the finished folder.
        replaced: state of every file of the folder to be replaced; None where there was none.
    """

    inode: int
    replaced: Mapping[str, FileState] | None


@dataclass(frozen=True, slots=True)
class Entries:
    """A journal that was read."""

    plan: str
    done: Mapping[str, Done]
    publication: Publication | None
    size: int  # bytes of whole lines; what follows is a torn one


def read_journal(work: Folder) -> Entries | None:
    """The journal of `work`; None where there is none of ours."""
    try:
        descriptor = work.read(JOURNAL)
    except OSError:
        return None
    with open(descriptor, "rb") as stream:
        raw = stream.read(_MAX_SIZE)
    plan, done, publication, size = None, {}, None, 0
    for line in raw.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
            if plan is None:
                plan = _plan(entry)
            elif entry is None:
                break
            elif "done" in entry:
                done[entry["done"]] = Done(entry["size"], entry["digests"])
            elif "publish" in entry:
                publication = _publication(entry)
        except (ValueError, TypeError, KeyError):
            break
        if plan is None:
            return None
        size += len(line)
    return None if plan is None else Entries(plan, done, publication, size)


def is_torn_marker(work: Folder) -> bool:
    """Whether `work` holds nothing but the beginning of a marker: its run died there."""
    if work.names() != [JOURNAL]:
        return False
    try:
        with open(work.read(JOURNAL), "rb") as stream:
            raw = stream.read(4096)
    except OSError:
        return False
    return b"\n" not in raw and raw[: len(_BEGINNING)] == _BEGINNING[: len(raw)]


class Journal:
    """A journal being written: each line is on the disk before the next step."""

    def __init__(self, work: Folder, kept: int) -> None:
        """Open it in `work`, keeping the first `kept` bytes."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(JOURNAL, flags, 0o666, dir_fd=work.descriptor)
        os.ftruncate(self._descriptor, kept)

    def begin(self, plan: str) -> None:
        """Write the marker."""
        self._record({"marker": _MARKER, "plan": plan})

    def done(self, name: str, done: Done) -> None:
        """Note that `name` is finished and synced."""
        self._record({"done": name, "size": done.size, "digests": dict(done.digests)})

    def publish(self, publication: Publication) -> None:
        """Note what is about to be published, and what it replaces."""
        replaced = publication.replaced
        listed = None if replaced is None else {n: _state_json(s) for n, s in replaced.items()}
        self._record({"publish": publication.inode, "replaced": listed})

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _record(self, entry: Mapping[str, Any]) -> None:
        line = memoryview((json.dumps(entry) + "\n").encode())
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)


def _plan(entry: Any) -> str | None:
    is_ours = isinstance(entry, dict) and entry.get("marker") == _MARKER
    return str(entry["plan"]) if is_ours else None


def _state_json(state: FileState) -> list[int]:
    return [state.size, state.mtime_ns, state.inode]


def _publication(entry: Mapping[str, Any]) -> Publication:
    replaced = entry["replaced"]
    listed = None if replaced is None else {n: FileState(*s) for n, s in replaced.items()}
    return Publication(int(entry["publish"]), listed)
