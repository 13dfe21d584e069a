"""Is it safe to write OUT? Asked of real files, by device and inode, before anything is written.

Paths lie: a folder has many names through links and mounts. So what is read is compared with what
would be removed or written into by (device, inode).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable
from pathlib import Path

from gemma_fold.checkpoint.folder import is_mount_point
from gemma_fold.checkpoint.listing import below, is_empty_or_absent
from gemma_fold.checkpoint.names import is_work_folder_name
from gemma_fold.checkpoint.source import FileState
from gemma_fold.errors import UsageError

Identity = tuple[int, int]  # device, inode


def target_folder(out: str | os.PathLike[str]) -> Path:
    """The folder that `out` names; UsageError if none can be put there."""
    if not os.fspath(out):
        raise UsageError("the name of the folder to write is empty; name one")
    target = Path(out)
    real = Path(os.path.realpath(target))
    if not real.name:
        raise UsageError(f"{target} is the root of the file system; name a folder")
    for folder in (real, *real.parents):
        if is_work_folder_name(folder.name):
            raise UsageError(
                f"{target} is or lies in {folder.name}, as work folders of gemma-fold are called; "
                "name another folder"
            )
    if is_mount_point(real):
        raise UsageError(f"{target} is a mount point, which cannot move; name a folder inside it")
    return target


def check_target(source: Path, inputs: Iterable[Path], out: Path, removed: Iterable[Path]) -> None:
    """Refuse an `out` that lies in, holds or is the source, or shares a file with it.

    Args:
        source: the folder that is read.
        inputs: every file and folder in it, links followed.
        out: the folder to be written.
        removed: folders whose content this run may remove.

    Raises:
        UsageError: writing or removing would endanger the source.
    """
    real_source, real_out = Path(os.path.realpath(source)), Path(os.path.realpath(out))
    if real_out == real_source:
        raise UsageError(f"{out} is the source itself; name another folder")
    if out.is_symlink() and not out.exists():
        raise UsageError(f"{out} is a link to nothing; remove it or name another folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder")
    read = {_identity(path): path for path in (*inputs, real_source)}
    for above in real_out.parents:
        if above.exists() and above != Path(above.anchor) and _identity(above) in read:
            raise UsageError(f"{out} lies inside the source {source}; name a folder outside it")
    if real_out in real_source.parents:
        raise UsageError(f"{out} contains the source {source}; name another folder")
    for folder in removed:
        for identity in _identities(folder):
            if identity in read:
                raise UsageError(
                    f"{folder} holds {read[identity]}, which is read; name another folder for OUT"
                )


def check_replaceable(out: Path, known: Collection[str] | None) -> dict[str, FileState] | None:
    """Whether `out` may be written: absent, empty, or made of the files in `known` alone.

    Args:
        out: the folder to be written.
        known: relative names that a replacement may remove; None if nothing may be replaced.

    Returns:
        The state of every file to be replaced; None if `out` is absent or empty.

    Raises:
        UsageError: something is in the way.
    """
    if is_empty_or_absent(out):
        return None
    if known is None:
        raise UsageError(f"{out} is not empty; name a new folder, or empty that one")
    found = {}
    for name, status in below(out):
        if not stat.S_ISDIR(status.st_mode):
            found[name] = status
        elif is_mount_point(out / name):
            raise UsageError(
                f"{out / name} is a mount point, whose files are elsewhere; unmount it, or name a "
                "new folder"
            )
    for name in sorted(found.keys() - set(known)):
        raise UsageError(
            f"{out} holds {name}, which is not part of the folded checkpoint there; "
            "move it elsewhere, or name a new folder"
        )
    return {name: FileState.of(status) for name, status in found.items()}


def _identity(path: Path) -> Identity:
    status = path.stat()
    return status.st_dev, status.st_ino


def _identities(folder: Path) -> Iterable[Identity]:
    """Of a folder and everything below it; no link is followed."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return
    yield status.st_dev, status.st_ino
    if stat.S_ISDIR(status.st_mode):
        for _, inner in below(folder):
            yield inner.st_dev, inner.st_ino
