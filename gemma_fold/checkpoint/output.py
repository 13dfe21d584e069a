"""A folder that is absent or complete, whatever kills the process.

Everything is written into `OUT.partial` beside the target and renamed at the very end. A journal in
there names the finished files, so that an interrupted run can be continued; an exclusive lock on
the folder itself keeps a second writer out and disappears with the process that holds it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_fold.errors import EnvironmentProblem, GemmaFoldError, UsageError

JOURNAL = ".gemma-fold-journal"


def check_target(source: Path, out: Path, *, marker: str | None) -> None:
    """Refuse an `out` that would endanger `source` or anything else that is there.

    `marker` names a file that makes a non-empty `out` ours to replace; None means: never replace.
    """
    real_source, real_out = Path(os.path.realpath(source)), Path(os.path.realpath(out))
    if real_out == real_source:
        raise UsageError(f"{out} is the source itself; name another folder")
    if real_source in real_out.parents:
        raise UsageError(f"{out} lies inside the source {source}; name a folder outside it")
    if real_out in real_source.parents:
        raise UsageError(f"{out} contains the source {source}; name another folder")
    if out.is_symlink() and not out.exists():
        raise UsageError(f"{out} is a link to nothing; remove it or name another folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if marker is None:
        raise UsageError(f"{out} is not empty; name a new folder, or empty that one")
    if not (out / marker).is_file():
        raise UsageError(
            f"{out} is not empty and holds no folded checkpoint, so it is not replaced; "
            "name a new folder"
        )


def check_space(folder: Path, needed: int) -> None:
    """EnvironmentProblem unless the file system of `folder` has `needed` bytes free."""
    status = os.statvfs(_existing(folder))
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise EnvironmentProblem(
            f"not enough space for {folder}: {needed:,} bytes needed, {free:,} free; "
            "free some or choose another disk"
        )


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


class Staging:
    """The folder being written. Use `open_staging`; files are named relative to it."""

    def __init__(self, out: Path, path: Path, lock: int, done: dict[str, int]) -> None:
        self.out = out
        self.path = path
        self._lock = lock
        self._done = done

    def is_done(self, name: str) -> bool:
        """Whether an earlier run finished `name`, and it is still there at its full size."""
        target = self.path / name
        return (
            name in self._done and target.is_file() and (target.stat().st_size == self._done[name])
        )

    @contextmanager
    def create(self, name: str) -> Iterator[int]:
        """Open a new file for reading and writing; on success it is synced and journalled."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            yield descriptor
            os.fsync(descriptor)
            self._record({"done": name, "size": os.fstat(descriptor).st_size})
        finally:
            os.close(descriptor)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.create(name) as descriptor:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]

    def _record(self, entry: dict[str, object]) -> None:
        with open(self.path / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self) -> None:
        """Make the folder appear under its final name, complete, in one rename."""
        (self.path / JOURNAL).unlink()
        for folder, _, _ in os.walk(self.path):
            _sync_folder(Path(folder))
        replaced = None
        if self.out.is_dir() and any(self.out.iterdir()):
            replaced = self.out.with_name(f"{self.out.name}.replaced-{os.getpid()}")
            self.out.rename(replaced)
        os.rename(self.path, self.out)
        _sync_folder(self.out.parent)
        if replaced is not None:
            shutil.rmtree(replaced)

    def discard(self) -> None:
        """Remove everything written so far."""
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._lock)


@contextmanager
def open_staging(out: Path, plan: str, *, resume: bool, force: bool) -> Iterator[Staging]:
    """Lock and open `OUT.partial` for the work that the digest `plan` identifies.

    On leaving without an error the folder is published. An interruption or a full disk leaves it
    in place for `resume`; any other error removes it.

    Raises UsageError where an interrupted run is in the way, EnvironmentProblem where the folder
    cannot be written or is being written by another process.
    """
    target = Path(os.path.realpath(out))
    path = target.with_name(target.name + ".partial")
    with _explained(path):
        found = path.exists()
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock_folder(path)
    try:
        done = _continue_or_start(path, plan, found=found, resume=resume, force=force)
        staging = Staging(target, path, lock, done)
        try:
            with _explained(path):
                if not found or not (path / JOURNAL).exists():
                    staging._record({"plan": plan})
                yield staging
                staging.publish()
        except (EnvironmentProblem, KeyboardInterrupt):
            raise
        except BaseException:
            staging.discard()
            raise
    finally:
        os.close(lock)


def _lock_folder(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking, the other writer may have published the folder.
        if not path.is_dir() or os.fstat(descriptor).st_ino != path.stat().st_ino:
            raise BlockingIOError
    except BlockingIOError:
        os.close(descriptor)
        raise EnvironmentProblem(
            f"another process is writing {path}; wait for it to finish"
        ) from None
    return descriptor


def _continue_or_start(
    path: Path, plan: str, *, found: bool, resume: bool, force: bool
) -> dict[str, int]:
    """The files that an earlier run of the same plan finished; empties the folder if forced."""
    if not found or not any(path.iterdir()):
        return {}
    if force:
        for child in path.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        return {}
    if not resume:
        raise UsageError(
            f"an interrupted run left {path}; continue it with --resume, start over with --force"
        )
    entries = _read_journal(path / JOURNAL)
    if not entries or entries[0].get("plan") != plan:
        raise UsageError(
            f"{path} belongs to another source, version or set of options; start over with --force"
        )
    return {str(e["done"]): int(str(e["size"])) for e in entries[1:] if "done" in e and "size" in e}


def _read_journal(path: Path) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break  # the line that was being written when the process died
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, GemmaFoldError):
            raise
        advice = {
            errno.ENOSPC: "free some space, then run again with --resume",
            errno.EDQUOT: "free some of your quota, then run again with --resume",
            errno.EROFS: "choose a writable disk",
            errno.EACCES: "choose a folder you may write to",
            errno.EPERM: "choose a folder you may write to",
        }.get(error.errno or 0, "check the disk, then run again with --resume")
        raise EnvironmentProblem(f"cannot write {path}: {error.strerror}; {advice}") from error


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
