"""A folder that is absent or complete, whatever kills the process.

Everything is written into a hidden work folder beside OUT, `.OUT.gemma-fold`:

    journal   proves that the folder is ours, and says what is finished
    new/      the result as far as it is written
    old/      the replaced OUT for a moment, where two folders cannot be exchanged in one step

and appears under its own name in one rename at the very end. A folder without our journal is never
touched, whatever its name. A lock on the work folder keeps a second writer out and goes away with
its process. Whoever comes next finishes what a kill cut off: `settle`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from gemma_fold.checkpoint.folder import Folder, open_folder
from gemma_fold.checkpoint.journal import (
    JOURNAL,
    Done,
    Entries,
    Journal,
    Publication,
    is_torn_marker,
    read_journal,
)
from gemma_fold.checkpoint.rename import exchange, rename_new
from gemma_fold.checkpoint.source import FileState
from gemma_fold.errors import HostError, UsageError

_NEW, _OLD = "new", "old"
_LONGEST = 200  # bytes of OUT's name that fit into ours; file systems allow 255


def work_folder(out: Path) -> Path:
    """Where work on `out` is done."""
    target = Path(os.path.realpath(out))
    name = os.fsencode(target.name)
    if len(name) > _LONGEST:
        name = name[:100] + b"~" + hashlib.sha256(name).hexdigest()[:16].encode()
    return target.with_name(f".{os.fsdecode(name)}.gemma-fold")


def settle(out: Path) -> str | None:
    """Finish or clean up after a run that was killed while it published `out`.

    Returns:
        The plan of that run where its result now stands at `out`, else None.

    Raises:
        HostError: another process is writing, or the disk is in the way.
        UsageError: something that is not ours has the work folder's name.
    """
    path = work_folder(out)
    if not os.path.lexists(path):
        return None
    with _explained(path), open_folder(path.parent) as parent, _locked(parent, path) as work:
        entries = read_journal(work)
        if entries is None:
            if not work.names() or is_torn_marker(work):
                remove_work_folder(parent, work)  # its run died while it made or removed it
            return None
        place = _Place(parent, work, Path(os.path.realpath(out)))
        return entries.plan if place.settle(entries) else None


@dataclass(slots=True)
class _Place:
    """OUT, its parent and the work folder between them, with the moves that publish."""

    parent: Folder
    work: Folder
    out: Path
    notes: list[str] = field(default_factory=list)

    def settle(self, entries: Entries) -> bool:
        """Finish a publication that was cut off; whether there was one that had begun to move."""
        publication = entries.publication
        if publication is None:
            return False
        new, out = self.work.status(_NEW), self.parent.status(self.out.name)
        if new is not None and new.st_ino == publication.inode:
            if self.work.status(_OLD) is None:
                return False  # nothing has moved yet
            if out is not None:
                raise HostError(
                    f"{self.out} appeared while it was being replaced; the finished run is "
                    f"{self.work.path / _NEW}, the folder it replaces {self.work.path / _OLD}: "
                    "move those you need elsewhere"
                )
            rename_new(self.work, _NEW, self.parent, self.out.name)
        self.clean_up(publication)
        return True

    def publish(self, publication: Publication) -> None:
        """Move `new` to OUT, exchanging it for what is to be replaced."""
        name = self.out.name
        if publication.replaced is None:
            try:
                rename_new(self.work, _NEW, self.parent, name)
            except FileExistsError:
                raise HostError(
                    f"{self.out} appeared while this run was writing, and was not touched; "
                    f"the finished run is kept in {self.work.path}: move {self.out} elsewhere, "
                    "then run again with --resume"
                ) from None
        elif not exchange(self.work, _NEW, self.parent, name):
            self._replace()
        os.fsync(self.parent.descriptor)
        os.fsync(self.work.descriptor)

    def _replace(self) -> None:
        """The exchange in two renames, for file systems that have no other."""
        rename_new(self.parent, self.out.name, self.work, _OLD)
        os.fsync(self.work.descriptor)
        try:
            rename_new(self.work, _NEW, self.parent, self.out.name)
        except OSError:
            rename_new(self.work, _OLD, self.parent, self.out.name)
            raise

    def clean_up(self, publication: Publication) -> None:
        """Remove what was replaced, file by file as it was listed, and the work folder."""
        for name in (_NEW, _OLD):
            if self.work.status(name) is None:
                continue
            if not self.work.remove_listed(name, publication.replaced or {}):
                self._keep_aside(name)
        remove_work_folder(self.parent, self.work)

    def _keep_aside(self, name: str) -> None:
        """Give what is left of the replaced folder a name that its owner sees."""
        for number in range(1, 1000):
            kept = f"{self.out.name}.replaced" + (f"-{number}" if number > 1 else "")
            if self.parent.status(kept) is None:
                with suppress(FileExistsError):
                    rename_new(self.work, name, self.parent, kept)
                    self.notes.append(
                        f"the replaced {self.out} held files that were not part of it; "
                        f"they are kept in {self.parent.path / kept}"
                    )
                    return


class Staging:
    """The result being written. Use `open_staging`; files are named relative to it."""

    def __init__(self, place: _Place, journal: Journal, done: Mapping[str, Done]) -> None:
        self._place = place
        self._journal = journal
        self._done = dict(done)
        self._abandoned = False
        with place.work.open(_NEW) as new:
            self.folder = Folder(os.dup(new.descriptor), new.path)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the publication."""
        return tuple(self._place.notes)

    def done(self, name: str) -> Done | None:
        """What is known of `name` where a run finished it, and it is still there."""
        done, status = self._done.get(name), self.folder.status(name)
        if done is None or status is None or not stat.S_ISREG(status.st_mode):
            return None
        return done if status.st_size == done.size else None

    @contextmanager
    def create(self, name: str, digests: Mapping[str, str] | None = None) -> Iterator[int]:
        """Open a new file for reading and writing; on success it is synced and journalled.

        `digests` may be filled until the end of the block.
        """
        descriptor = self.folder.create(name)
        try:
            yield descriptor
            os.fsync(descriptor)
            done = Done(os.fstat(descriptor).st_size, digests or {})
            self._journal.done(name, done)
            self._done[name] = done
        finally:
            os.close(descriptor)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.create(name) as descriptor:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]

    def abandon(self) -> None:
        """Publish nothing: what was written is used up, and the work folder goes."""
        self._abandoned = True

    def publish(self, replaced: Mapping[str, FileState] | None) -> None:
        """Make the folder appear under its final name, complete."""
        if self._abandoned:
            remove_work_folder(self._place.parent, self._place.work)
            return
        self.folder.sync()
        publication = Publication(os.fstat(self.folder.descriptor).st_ino, replaced)
        self._journal.publish(publication)
        self._place.publish(publication)
        try:
            self._place.clean_up(publication)
        except OSError as error:
            self._place.notes.append(
                f"{self._place.work.path} could not be removed ({error.strerror}); "
                "the next run for the same folder does it"
            )

    def close(self) -> None:
        """Close the files that are open."""
        os.close(self.folder.descriptor)
        self._journal.close()


@contextmanager
def open_staging(
    out: Path,
    plan: str,
    *,
    size: int,
    resume: bool,
    restart: bool,
    replaced: Mapping[str, FileState] | None = None,
) -> Iterator[Staging]:
    """Lock and open the work folder of `out` for the work that the digest `plan` identifies.

    On leaving without an error the folder is published. An interruption, a full or a failing disk
    leaves it in place for `resume`; any other error removes it.

    Args:
        out: the folder to make.
        plan: identifies source, options and version.
        size: bytes that will be written in all.
        resume: continue an interrupted run.
        restart: discard an interrupted run.
        replaced: state of every file of the folder that stands at `out` and is to be replaced.

    Raises:
        UsageError: an interrupted run, or something that is not ours, is in the way.
        HostError: too little space, or the folder cannot be written or is being written
            by another process.
    """
    path = work_folder(out)
    with _explained(path), _made_parents(path.parent), open_folder(path.parent) as parent:
        with suppress(FileExistsError):
            os.mkdir(path.name, dir_fd=parent.descriptor)
        with _locked(parent, path) as work:
            place = _Place(parent, work, Path(os.path.realpath(out)))
            entries = _admit(place, plan, size, resume=resume, restart=restart)
            try:
                staging = _begin(place, plan, entries)
                try:
                    yield staging
                    staging.publish(replaced)
                finally:
                    staging.close()
            except (OSError, HostError, KeyboardInterrupt):
                raise  # kept for `resume`
            except BaseException:
                remove_work_folder(parent, work)
                raise


def remove_work_folder(parent: Folder, work: Folder) -> None:
    """Remove it, the journal last: until then what a kill leaves proves itself ours."""
    for name in work.names():
        if name != JOURNAL:
            work.remove(name)
    with suppress(FileNotFoundError):
        os.unlink(JOURNAL, dir_fd=work.descriptor)
    os.rmdir(work.path.name, dir_fd=parent.descriptor)


def _admit(place: _Place, plan: str, size: int, *, resume: bool, restart: bool) -> Entries | None:
    """The journal of the run to be continued; None where one begins in an empty work folder."""
    work = place.work
    entries = read_journal(work)
    if entries is None and work.names() and not is_torn_marker(work):
        raise UsageError(
            f"{work.path} was not made by gemma-fold, and was not touched; move it elsewhere"
        )
    if work.status(_OLD) is not None:
        raise HostError(f"{work.path / _OLD} is what {place.out} was; run once more")
    if entries is not None and not restart:
        if not resume:
            raise UsageError(
                f"an interrupted run left {work.path}; continue it with --resume, "
                "or start it over with --restart"
            )
        if entries.plan != plan:
            raise UsageError(
                f"{work.path} belongs to another source, version or set of options; "
                "start over with --restart"
            )
    else:
        work.remove(_NEW)
        entries = None
    try:
        _check_space(work, size)
    except HostError:
        if entries is None:
            remove_work_folder(place.parent, work)
        raise
    return entries


def _begin(place: _Place, plan: str, entries: Entries | None) -> Staging:
    journal = Journal(place.work, entries.size if entries else 0)
    if entries is None:
        journal.begin(plan)
    with suppress(FileExistsError):
        os.mkdir(_NEW, dir_fd=place.work.descriptor)
    return Staging(place, journal, entries.done if entries else {})


def _check_space(work: Folder, size: int) -> None:
    """HostError unless what is still to be written fits beside what is there."""
    status = os.fstatvfs(work.descriptor)
    free = status.f_bavail * status.f_frsize
    needed = size - (_allocated(work, _NEW) if work.status(_NEW) else 0)
    if free < needed:
        raise HostError(
            f"not enough space for {work.path}: {needed:,} bytes needed, {free:,} free; "
            "free some or choose another disk"
        )


def _allocated(folder: Folder, name: str) -> int:
    """Bytes of the files in a folder, as far as the disk holds them."""
    total = 0
    with folder.open(name) as inner:
        for child in inner.names():
            status = inner.status(child)
            if status is None:
                continue
            if stat.S_ISDIR(status.st_mode):
                total += _allocated(inner, child)
            else:
                total += min(status.st_size, status.st_blocks * 512)
    return total


@contextmanager
def _locked(parent: Folder, path: Path) -> Iterator[Folder]:
    """Open the work folder under its lock; it must be a folder itself, not a link to one."""
    try:
        opened = parent.open(path.name)
        with opened as work:
            fcntl.flock(work.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, the other writer may have published and removed it.
            found = parent.status(path.name)
            if found is None or os.fstat(work.descriptor).st_ino != found.st_ino:
                raise BlockingIOError
            yield Folder(work.descriptor, path)
    except BlockingIOError:
        raise HostError(f"another process is writing {path}; wait for it to finish") from None


@contextmanager
def _made_parents(folder: Path) -> Iterator[None]:
    """Make what is missing of a path; at the end remove what of that is still empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into one line that says what to do."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "free some space, then run again with --resume",
            errno.EDQUOT: "free some of your quota, then run again with --resume",
            errno.EROFS: "choose a writable disk",
            errno.EACCES: "choose a folder you may write to",
            errno.EPERM: "choose a folder you may write to",
            errno.ELOOP: "something not made by gemma-fold has this name: move it elsewhere",
            errno.ENOTDIR: "something not made by gemma-fold has this name: move it elsewhere",
        }.get(error.errno or 0, "check the disk, then run again with --resume")
        raise HostError(f"cannot write {path}: {error.strerror}; {advice}") from error
