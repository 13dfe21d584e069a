"""What lies below a folder. What cannot be listed is an error, not an empty folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from gemma_fold.errors import HostError


def below(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below `folder` by relative name, with its `lstat`; no link is followed.

    Raises:
        HostError: a folder cannot be listed, or what is in it cannot be looked at.
    """
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(folder / inside) as entries:
                found = sorted((e.name, e.stat(follow_symlinks=False)) for e in entries)
        except OSError as error:
            raise HostError(
                f"cannot list {folder / inside}: {error.strerror}; check the folder and the disk"
            ) from error
        for name, status in found:
            relative = f"{inside}/{name}" if inside else name
            yield relative, status
            if stat.S_ISDIR(status.st_mode):
                waiting.append(relative)


def is_there(path: Path) -> bool:
    """Whether `path` names anything, a link to nothing included.

    Raises:
        HostError: the disk does not answer; `os.path.lexists` would call that absent.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise HostError(
            f"cannot look at {path}: {error.strerror}; check the folder and the disk"
        ) from error
    return True


def is_empty_or_absent(folder: Path) -> bool:
    """Whether nothing is lost if something else takes the place of `folder`."""
    try:
        return not os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return not is_there(folder)
    except OSError as error:
        raise HostError(
            f"cannot list {folder}: {error.strerror}; check the folder and the disk"
        ) from error
