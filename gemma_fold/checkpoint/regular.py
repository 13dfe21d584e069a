"""Opening a file that somebody names: only a regular one, and without waiting for anybody."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from gemma_fold.errors import CheckpointError, HostError


def open_regular(path: Path) -> BinaryIO:
    """The regular file `path`, open for reading without a buffer.

    Raises:
        CheckpointError: there is nothing of that name, or no regular file.
        HostError: the system does not let us read it.
    """
    try:
        file = open(path, "rb", buffering=0, opener=without_waiting)  # noqa: SIM115  (closed by whoever asked)
    except IsADirectoryError:
        raise CheckpointError(f"{path}: not a regular file; correct the path") from None
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such file; fetch it, or correct the path") from None
    except OSError as error:
        raise HostError(
            f"{path}: cannot be read ({error.strerror}); check its permissions and the disk"
        ) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path}: not a regular file; correct the path")
    return file


def read_range(path: Path, begin: int, end: int) -> bytes:
    """The bytes [begin, end) of a regular file; raises as `open_regular`, and where it shrank."""
    with open_regular(path) as file:
        raw = os.pread(file.fileno(), end - begin, begin)
    if len(raw) != end - begin:
        raise CheckpointError(f"{path} shrank while it was read; let its writer finish")
    return raw


def without_waiting(path: str, flags: int, folder: int | None = None) -> int:
    """Open `path`, below an open folder if given: a pipe would keep us until someone writes."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
