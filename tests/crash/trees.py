"""Folders as values: what lies below one, byte for byte, without any help of gemma_fold."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Collection
from pathlib import Path

Tree = dict[str, tuple[str, ...]]


def tree(folder: Path, *, without: Collection[str] = ()) -> Tree:
    """Kind, mode and content of everything below `folder`; links are not followed.

    `without` names entries of `folder` itself to leave out.
    """
    found: Tree = {}
    _look(str(folder), "", found, without)
    return found


def _look(folder: str, inside: str, found: Tree, without: Collection[str]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in without:
                continue
            name = inside + entry.name
            status = entry.stat(follow_symlinks=False)
            mode = oct(stat.S_IMODE(status.st_mode))
            if stat.S_ISLNK(status.st_mode):
                found[name] = ("link", os.readlink(entry.path))
            elif stat.S_ISDIR(status.st_mode):
                found[name] = ("folder", mode)
                _look(entry.path, name + "/", found, ())
            else:
                with open(entry.path, "rb", buffering=0) as file:
                    digest = hashlib.sha256(file.read()).hexdigest()
                found[name] = ("file", mode, digest)


def difference(found: Tree, expected: Tree) -> str:
    """The first few names that differ."""
    names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    kinds = (
        f"{name} {'missing' if name not in found else 'extra' if name not in expected else 'other'}"
        for name in names[:4]
    )
    return ", ".join(kinds)


def remove(path: Path) -> None:
    """Remove whatever `path` is."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
