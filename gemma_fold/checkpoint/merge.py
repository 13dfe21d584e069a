"""Move a finished folder's files over those of another model, whose folder holds other files, too.

Two folders are exchanged in one step; files are not. So what is to happen is in the journal before
the first file moves, and whoever comes after a kill goes on from there. The last file to come is
the one that every loader begins with, and the first to go is the old one.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from gemma_fold.checkpoint.folder import Folder
from gemma_fold.checkpoint.source import CONFIG, FileState

GOES = "old-" + CONFIG  # the old config, beside the new files, until all of them are in place


@dataclass(frozen=True, slots=True)
class Merge:
    """What is to be moved where.

    Attributes:
        into: inode of the folder that the files are moved to.
        written: files to be moved.
        replaced: what every file that has to make way for them was.
    """

    into: int
    written: tuple[str, ...]
    replaced: Mapping[str, FileState]


def plan_merge(out: Folder, written: Iterable[str], is_stale: Callable[[str], bool]) -> Merge:
    """What moving the files `written` to `out` replaces there, and which of the rest are stale."""
    names = tuple(sorted(written))
    states = {name: out.status(name) for name in {*names, *filter(is_stale, out.names())}}
    replaced = {
        name: FileState.of(status)
        for name, status in states.items()
        if status is not None and not stat.S_ISDIR(status.st_mode)
    }
    return Merge(os.fstat(out.descriptor).st_ino, names, replaced)


def conflict(new: Folder, out: Folder, merge: Merge) -> str | None:
    """A file in `out` that is not what it was when `merge` was planned, so that it must stay."""
    for name in {*merge.written, *merge.replaced}:
        try:
            status = out.status(name)
            pending = name not in merge.written or new.status(name) is not None
        except OSError:
            return name  # a link or a file where a folder was
        if status is not None and pending and merge.replaced.get(name) != FileState.of(status):
            return name
    return None


def finish_merge(work: Folder, new: Folder, out: Folder, merge: Merge) -> None:
    """Do what is left of `merge`.

    Raises:
        FileExistsError: something else has come in the way; no file of `out` was touched.
    """
    found = conflict(new, out, merge)
    if found is not None:
        raise FileExistsError(errno.EEXIST, f"{out.path / found} was changed meanwhile")
    if new.status(CONFIG) is not None and out.status(CONFIG) is not None:
        # Where files cannot be moved between the two folders, this fails before any is lost.
        os.rename(CONFIG, GOES, src_dir_fd=out.descriptor, dst_dir_fd=work.descriptor)
    for name in merge.written:
        if name != CONFIG:
            _move(new, out, name)
    for name in merge.replaced.keys() - set(merge.written):
        if out.status(name) is not None:
            os.unlink(name, dir_fd=out.descriptor)
    if CONFIG in merge.written:
        os.fsync(out.descriptor)
        _move(new, out, CONFIG)
    os.fsync(out.descriptor)
    if work.status(GOES) is not None:
        os.unlink(GOES, dir_fd=work.descriptor)


def _move(new: Folder, out: Folder, name: str) -> None:
    """Move a file that has not been moved yet."""
    if new.status(name) is None:
        return
    above = name.rpartition("/")[0]
    if above:
        out.make(above)
    with new.parent_of(name) as (source, last), out.parent_of(name) as (target, _):
        os.replace(last, last, src_dir_fd=source.descriptor, dst_dir_fd=target.descriptor)
        if above:
            os.fsync(target.descriptor)
