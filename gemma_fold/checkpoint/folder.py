"""An open folder: everything is named relative to it, and no link is followed on the way.

A path that is resolved again for every call can be redirected between two of them. Here the folder
is opened once; each component below it is opened with O_NOFOLLOW, and files are only ever created
anew (openat(2), O_EXCL).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gemma_fold.checkpoint.names import check_name
from gemma_fold.checkpoint.regular import without_waiting

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Owned = Callable[[str, os.stat_result], bool]


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder held open.

    Attributes:
        descriptor: open on the folder; whoever opened it closes it.
        path: where it was, for messages only.
    """

    descriptor: int
    path: Path

    @contextmanager
    def open(self, name: str) -> Iterator[Folder]:
        """Open the subfolder `name`; OSError if it is a link, a file or absent."""
        descriptor = os.dup(self.descriptor)
        try:
            for part in name.split("/"):
                inner = os.open(part, _FOLDER, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
            yield Folder(descriptor, self.path / name)
        finally:
            os.close(descriptor)

    @contextmanager
    def parent_of(self, name: str) -> Iterator[tuple[Folder, str]]:
        """The folder that holds `name`, opened, and the last part of the name."""
        above, _, last = name.rpartition("/")
        if not above:
            yield self, last
            return
        with self.open(above) as folder:
            yield folder, last

    def make(self, name: str) -> None:
        """Create the subfolder `name` and what is missing above it."""
        parts = check_name(name, self.path).split("/")
        for depth in range(1, len(parts) + 1):
            with (
                self.parent_of("/".join(parts[:depth])) as (folder, last),
                suppress(FileExistsError),
            ):
                os.mkdir(last, dir_fd=folder.descriptor)

    def create(self, name: str) -> int:
        """Open a new file for reading and writing; what an earlier run left there goes."""
        above = check_name(name, self.path).rpartition("/")[0]
        if above:
            self.make(above)
        with self.parent_of(name) as (folder, last):
            with suppress(FileNotFoundError):
                os.unlink(last, dir_fd=folder.descriptor)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(last, flags, 0o666, dir_fd=folder.descriptor)

    def read(self, name: str) -> int:
        """Open the file `name` for reading; if it is a pipe, without waiting for a writer."""
        with self.parent_of(check_name(name, self.path)) as (folder, last):
            return without_waiting(last, os.O_RDONLY | os.O_NOFOLLOW, folder.descriptor)

    def status(self, name: str) -> os.stat_result | None:
        """`lstat` of `name`, or None if there is nothing."""
        try:
            with self.parent_of(name) as (folder, last):
                return os.stat(last, dir_fd=folder.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """What lies in the folder itself."""
        return sorted(os.listdir(self.descriptor))

    def files(self) -> list[str]:
        """Every file in the folder and below, by relative name."""
        found: list[str] = []
        for name in self.names():
            status = self.status(name)
            if status is not None and stat.S_ISDIR(status.st_mode):
                with self.open(name) as inner:
                    found += (f"{name}/{below}" for below in inner.files())
            elif status is not None:
                found.append(name)
        return found

    def sync(self, *, files: bool = False) -> None:
        """Bring the folder's entries, and those of all folders below it, to the disk.

        With `files`, their content too.
        """
        for name in self.names():
            status = self.status(name)
            if status is not None and stat.S_ISDIR(status.st_mode):
                with self.open(name) as inner:
                    inner.sync(files=files)
            elif files and status is not None and stat.S_ISREG(status.st_mode):
                descriptor = self.read(name)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        os.fsync(self.descriptor)

    def remove_owned(self, name: str, is_ours: Owned) -> bool:
        """Remove from the folder `name` the files that are ours, and the folders left empty.

        No link is followed, and nothing is removed from what is mounted there.

        Args:
            name: of a folder in this one.
            is_ours: is given each file's name relative to `name`, and its `lstat`.

        Returns:
            Whether nothing else was there, so that the folder itself is gone, too.
        """
        with self.open(name) as inner:
            try:
                inner._remove_owned("", is_ours)
            except RecursionError:
                return False  # nothing of ours is that deep
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                return False
        return self._remove_empty(name)

    def _remove_owned(self, inside: str, is_ours: Owned) -> None:
        mount = _mount_of(self.descriptor)
        for name in self.names():
            status = self.status(name)
            if status is None:
                continue
            if stat.S_ISDIR(status.st_mode):
                with self.open(name) as inner:
                    if _mount_of(inner.descriptor) != mount:
                        continue
                    inner._remove_owned(f"{inside}{name}/", is_ours)
                self._remove_empty(name)
            elif is_ours(inside + name, status):
                os.unlink(name, dir_fd=self.descriptor)

    def _remove_empty(self, name: str) -> bool:
        """Remove the folder `name` if nothing is in it; whether that was so."""
        try:
            os.rmdir(name, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                return False
            raise
        return True


def is_mount_point(path: Path) -> bool:
    """Whether the folder at `path` is mounted there; False if there is none.

    Unlike `os.path.ismount`, it also finds a folder of the same file system that is bound there.
    """
    mounts = []
    for folder in (path, path.parent):
        try:
            descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            mounts.append(_mount_of(descriptor))
        finally:
            os.close(descriptor)
    return mounts[0] != mounts[1]


def _mount_of(descriptor: int) -> int:
    """What an open folder was reached through; its device if this system does not give more."""
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    found = [int(line.split()[1]) for line in lines if line.startswith("mnt_id:")]
    return found[0] if found else os.fstat(descriptor).st_dev


@contextmanager
def open_folder(path: Path) -> Iterator[Folder]:
    """Open the folder at `path`, whose own last component may be a link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Folder(descriptor, path)
    finally:
        os.close(descriptor)
