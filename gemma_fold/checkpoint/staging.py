"""A folder that is absent or complete, whatever kills the process.

Everything is written into a hidden work folder beside OUT, `.OUT.gemma-fold`:

    journal   proves that the folder is ours, and lists what is finished
    new/      the result as far as it is written
    old/      the replaced OUT for a moment, if two folders cannot be exchanged in one step

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
from collections.abc import Callable, Collection, Iterator, Mapping
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
from gemma_fold.checkpoint.listing import is_there
from gemma_fold.checkpoint.merge import GOES, Merge, conflict, finish_merge, plan_merge
from gemma_fold.checkpoint.names import work_folder_name
from gemma_fold.checkpoint.rename import exchange, rename_new
from gemma_fold.checkpoint.source import FileState
from gemma_fold.errors import HostError, UsageError

_NEW, _OLD = "new", "old"
_LONGEST = 200  # bytes of OUT's name that fit into ours; file systems allow 255


def work_folder(out: Path) -> Path:
    """Where work on `out` is done."""
    target = Path(os.path.realpath(out))
    return target.with_name(work_folder_name(_shortened(target.name)))


def _shortened(name: str) -> str:
    """A name that leaves room for what ours add to it."""
    raw = os.fsencode(name)
    if len(raw) > _LONGEST:
        raw = raw[:100] + b"~" + hashlib.sha256(raw).hexdigest()[:16].encode()
    return os.fsdecode(raw)


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a run that was killed.

    Attributes:
        plan: of that run if its result now stands at OUT, else None.
        notes: what the user should know, a line each.
    """

    plan: str | None = None
    notes: tuple[str, ...] = ()


def settle(out: Path) -> Settled:
    """Finish or clean up after a run that was killed while it published `out`.

    Raises:
        HostError: another process is writing, or the disk is in the way.
        UsageError: something that is not ours has the work folder's name.
    """
    path = work_folder(out)
    if not is_there(path):
        return Settled()
    with _explained(path), open_folder(path.parent) as parent, _locked(parent, path) as work:
        place = _Place(parent, work, Path(os.path.realpath(out)))
        entries = read_journal(work)
        if entries is None:
            if not work.names() or is_torn_marker(work):
                place.remove_work(None)  # its run died while it made or removed it
            return Settled()
        finished = place.settle(entries)
        return Settled(entries.plan if finished else None, tuple(place.notes))


@dataclass(slots=True)
class _Place:
    """OUT, its parent and the work folder between them, with the moves that publish."""

    parent: Folder
    work: Folder
    out: Path
    again: str = "run again with --resume"
    notes: list[str] = field(default_factory=list)

    def settle(self, entries: Entries) -> bool:
        """Finish what was cut off; whether a publication's result stands at OUT."""
        if entries.merge is not None:
            self.settle_merge(entries.merge, entries.files)
            return False
        publication = entries.publication
        if publication is None or not self.has_moved(publication):
            return False
        new, out = self.work.status(_NEW), self.parent.status(self.out.name)
        if new is not None and new.st_ino == publication.inode:
            if out is not None:
                raise HostError(
                    f"{self.out} appeared while it was being replaced; the finished run is "
                    f"{self.work.path / _NEW}, the folder it replaces {self.work.path / _OLD}: "
                    "move those you need elsewhere"
                )
            rename_new(self.work, _NEW, self.parent, self.out.name)
        published = self.is_published(publication)
        # If something else came to stand at OUT, what it took the place of is kept.
        seen = publication if published else Publication(publication.inode, {})
        self.clean_up(seen, entries.files)
        return published

    def is_published(self, publication: Publication) -> bool:
        """Whether its result stands at OUT."""
        out = self.parent.status(self.out.name)
        return out is not None and out.st_ino == publication.inode

    def settle_merge(self, merge: Merge, files: frozenset[str] | None) -> None:
        """Finish a merge that was cut off, or keep its files if OUT is not what it was."""
        out = self.parent.status(self.out.name)
        same = out is not None and out.st_ino == merge.into
        if self.work.status(_NEW) is not None and not (same and self._finish(merge)):
            if self.work.status(GOES) is not None:
                with self.work.open(_NEW) as new:
                    rename_new(self.work, GOES, new, GOES)
            self._keep_aside(_NEW, f"a save over {self.out} was interrupted; the rest of it is")
        self.remove_work(files)

    def merge(self, merge: Merge, files: frozenset[str] | None) -> None:
        """Move the files of `new` into OUT, and remove the work folder."""
        with self.work.open(_NEW) as new, self.parent.open(self.out.name) as out:
            finish_merge(self.work, new, out, merge)
        self.remove_work(files)

    def _finish(self, merge: Merge) -> bool:
        """Go on with a merge; False if something else is in its way now."""
        with self.work.open(_NEW) as new, self.parent.open(self.out.name) as out:
            if conflict(new, out, merge) is not None:
                return False
            finish_merge(self.work, new, out, merge)
            return True

    def has_moved(self, publication: Publication) -> bool:
        """Whether a rename of this publication was done, so that `new` is not the result."""
        new = self.work.status(_NEW)
        if new is None or self.work.status(_OLD) is not None:
            return True
        # Without something to replace, nothing ever takes the place of `new`: this one is a copy.
        return new.st_ino != publication.inode and publication.replaced is not None

    def is_half_done(self, entries: Entries) -> bool:
        """Whether there is something left to settle."""
        publication = entries.publication
        return entries.merge is not None or (
            publication is not None and self.has_moved(publication)
        )

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
                    f"then {self.again}"
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

    def clean_up(self, publication: Publication, files: frozenset[str] | None) -> None:
        """Remove what was replaced, file by file as it was listed, and the work folder."""
        listed = publication.replaced or {}
        for name in (_NEW, _OLD):
            status = self.work.status(name)
            if status is None:
                continue
            if not stat.S_ISDIR(status.st_mode) or not self.work.remove_owned(
                name, lambda path, found: listed.get(path) == FileState.of(found)
            ):
                self._keep_aside(
                    name, f"the replaced {self.out} held files that were not part of it; they are"
                )
        if not self.remove_work(files):
            self.notes.append(
                f"{self.work.path} holds files that gemma-fold did not write; move them elsewhere"
            )

    def remove_new(self, files: frozenset[str] | None) -> bool:
        """Remove what a run wrote, or was to write; whether nothing else was there."""
        status = self.work.status(_NEW)
        if status is None:
            return True
        if stat.S_ISLNK(status.st_mode):
            os.unlink(_NEW, dir_fd=self.work.descriptor)
            return True
        return self.work.remove_owned(
            _NEW,
            lambda path, found: files is None or path in files or stat.S_ISLNK(found.st_mode),
        )

    def remove_work(self, files: frozenset[str] | None) -> bool:
        """Remove the work folder if all that is in it is ours; whether that was so.

        The journal goes last: until then what a kill leaves proves itself ours.
        """
        if self.work.status(_OLD) is not None or not self.remove_new(files) or self.strangers():
            return False
        for name in (GOES, JOURNAL):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.work.descriptor)
        os.rmdir(self.work.path.name, dir_fd=self.parent.descriptor)
        return True

    def strangers(self) -> list[str]:
        """What lies in the work folder beside what a run puts there."""
        return [name for name in self.work.names() if name not in (JOURNAL, _NEW, _OLD, GOES)]

    def _keep_aside(self, name: str, what: str) -> None:
        """Give a folder or file with bytes of the user's a name that its owner sees."""
        for number in range(1, 1000):
            kept = f"{_shortened(self.out.name)}.replaced" + (f"-{number}" if number > 1 else "")
            if self.parent.status(kept) is None:
                with suppress(FileExistsError):
                    rename_new(self.work, name, self.parent, kept)
                    self.notes.append(f"{what} kept in {self.parent.path / kept}")
                    return
        raise FileExistsError(errno.EEXIST, f"{self.out.name}.replaced and 998 more are taken")


class Staging:
    """The result being written. Use `open_staging`; files are named relative to it."""

    def __init__(
        self,
        place: _Place,
        journal: Journal,
        done: Mapping[str, Done],
        files: frozenset[str] | None,
    ) -> None:
        self._place = place
        self._journal = journal
        self._done = dict(done)
        self._files = files
        self._moving = False
        with place.work.open(_NEW) as new:
            self.folder = Folder(os.dup(new.descriptor), new.path)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the publication."""
        return tuple(self._place.notes)

    def done(self, name: str) -> Done | None:
        """What is known of `name` if a run finished it, and it is what it was then."""
        done, status = self._done.get(name), self.folder.status(name)
        if done is None or status is None or not stat.S_ISREG(status.st_mode):
            return None
        return done if FileState.of(status) == done.state else None

    @contextmanager
    def create(self, name: str, digests: Mapping[str, str] | None = None) -> Iterator[int]:
        """Open a new file for reading and writing; on success it is synced and journalled.

        `digests` may be filled until the end of the block.
        """
        descriptor = self.folder.create(name)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        status = self.folder.status(name)  # network file systems set the times when it is closed
        if status is None:
            raise FileNotFoundError(errno.ENOENT, f"{name} has vanished")
        done = Done(FileState.of(status), digests or {})
        self._journal.done(name, done)
        self._done[name] = done

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.create(name) as descriptor:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]

    def merge(self, is_stale: Callable[[str], bool]) -> None:
        """Instead of publishing, move the files into OUT, which holds others that stay.

        Args:
            is_stale: whether a file at the top of OUT goes, though none of its name was written.
        """
        self.folder.sync(files=True)
        with self._place.parent.open(self._place.out.name) as out:
            merge = plan_merge(out, self.folder.files(), is_stale)
        self._journal.merge(merge)
        self._moving = True
        self._place.merge(merge, self._files)

    def publish(self, replaced: Mapping[str, FileState] | None) -> None:
        """Make the folder appear under its final name, complete."""
        if self._moving:
            return  # by `merge`
        self._check_complete()
        self.folder.sync()
        publication = Publication(os.fstat(self.folder.descriptor).st_ino, replaced)
        self._journal.publish(publication)
        self._moving = True  # from here on `new` may be what was replaced
        self._place.publish(publication)
        if not self._place.is_published(publication):
            raise HostError(
                f"{self._place.work.path / _NEW} was moved by another process while this run "
                f"published it, so {self._place.out} is not its result; nothing was removed"
            )
        try:
            self._place.clean_up(publication, self._files)
        except OSError as error:
            self._place.notes.append(
                f"{self._place.work.path} could not be removed ({error.strerror}); "
                "the next run for the same folder does it"
            )

    def _check_complete(self) -> None:
        """HostError unless every file is what was written."""
        for name in sorted(self._files or ()):
            done, status = self._done.get(name), self.folder.status(name)
            if (
                done is None
                or status is None
                or (done.state.size, done.state.inode) != (status.st_size, status.st_ino)
            ):
                raise HostError(
                    f"{self.folder.path / name} is not what was written: something changed it, or "
                    f"the disk takes another file's name for its own; {self._place.again}"
                )

    def discard(self) -> None:
        """Remove what was written, unless some of it may have been published."""
        if not self._moving:
            with suppress(OSError):  # what led here is the error to report
                self._place.remove_work(self._files)

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
    files: Collection[str] | None = None,
    replaced: Mapping[str, FileState] | None = None,
    again: str = "run again with --resume",
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
        files: all that may be written, so that nothing else is removed; None if that is not
            known.
        replaced: state of every file of the folder that stands at `out` and is to be replaced.
        again: what a message advises after the disk was in the way.

    Raises:
        UsageError: an interrupted run, or something that is not ours, is in the way.
        HostError: too little space, or the folder cannot be written or is being written
            by another process.
    """
    path = work_folder(out)
    with _explained(path, again), _made_parents(path.parent), open_folder(path.parent) as parent:
        with suppress(FileExistsError):
            os.mkdir(path.name, dir_fd=parent.descriptor)
        with _locked(parent, path) as work:
            place = _Place(parent, work, Path(os.path.realpath(out)), again)
            entries = _admit(place, plan, size, resume=resume, restart=restart)
            staging = _begin(place, plan, entries, None if files is None else frozenset(files))
            try:
                yield staging
                staging.publish(replaced)
            except (OSError, HostError, KeyboardInterrupt):
                raise  # kept for `resume`
            except BaseException:
                staging.discard()
                raise
            finally:
                staging.close()


def _admit(place: _Place, plan: str, size: int, *, resume: bool, restart: bool) -> Entries | None:
    """The journal of the run to be continued; None if one begins in an empty work folder."""
    work = place.work
    entries = read_journal(work)
    if entries is None and work.names() and not is_torn_marker(work):
        raise UsageError(
            f"{work.path} was not made by gemma-fold, and was not touched; move it elsewhere"
        )
    for name in place.strangers():
        raise UsageError(f"{work.path / name} was not made by gemma-fold; move it elsewhere")
    if work.status(_OLD) is not None or (entries is not None and place.is_half_done(entries)):
        raise HostError(
            f"another run was stopped while it moved files to {place.out}; run once more"
        )
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
        if not place.remove_new(entries.files if entries else None):
            raise UsageError(
                f"{work.path / _NEW} holds files that gemma-fold did not write; move them elsewhere"
            )
        if work.names():  # the journal alone, which was found to be ours
            os.unlink(JOURNAL, dir_fd=work.descriptor)
        entries = None
    try:
        _check_space(work, size)
    except HostError:
        if entries is None:
            place.remove_work(None)
        raise
    return entries


def _begin(
    place: _Place, plan: str, entries: Entries | None, files: frozenset[str] | None
) -> Staging:
    journal = Journal(place.work, entries.size if entries else 0)
    if entries is None:
        journal.begin(plan, files)
    with suppress(FileExistsError):
        os.mkdir(_NEW, dir_fd=place.work.descriptor)
    return Staging(place, journal, entries.done if entries else {}, files)


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
    with folder.open(name) as inner:
        found = filter(None, map(inner.status, inner.files()))
        return sum(min(status.st_size, status.st_blocks * 512) for status in found)


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
def _explained(path: Path, again: str = "run again with --resume") -> Iterator[None]:
    """Turn the system's refusal to write into one line with advice."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: f"free some space, then {again}",
            errno.EDQUOT: f"free some of your quota, then {again}",
            errno.EROFS: "choose a writable disk",
            errno.EACCES: "choose a folder you may write to",
            errno.EPERM: "choose a folder you may write to",
            errno.EEXIST: "move what has these names elsewhere",
            errno.ELOOP: "something not made by gemma-fold has this name: move it elsewhere",
            errno.ENOTDIR: "something not made by gemma-fold has this name: move it elsewhere",
        }.get(error.errno or 0, f"check the disk, then {again}")
        raise HostError(f"cannot write {path}: {error.strerror}; {advice}") from error
