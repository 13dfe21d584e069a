"""Copying byte ranges between files without carrying them through Python.

The ladder, best first; each rung is tried until the kernel or the file system refuses it:

    reflink           FICLONERANGE: both files share the blocks, nothing is moved
    copy_file_range   inside the kernel, or on the server of a network file system
    sendfile          inside the kernel, also between file systems of different kinds
    read_write        everywhere; its errors are raised

Between offsets that do not fall on the same place within a page, copy_file_range and sendfile write
every page in two pieces and take twice as long as read_write with whole pages. They are left out
there, except on file systems whose server does the copying.

Sources: ioctl_ficlonerange(2), copy_file_range(2), sendfile(2).
"""

import errno
import fcntl
import mmap
import os
import struct
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from gemma_fold.checkpoint.layout import Run
from gemma_fold.checkpoint.regular import open_regular
from gemma_fold.errors import CheckpointError, GemmaFoldError, HostError

STEP = 64 * 2**20
"""Bytes per system call: how often progress is reported and Ctrl-C is heard."""

_BUFFER = 2**19  # stays in the second-level cache; 8 MiB is several times slower
_MIN_CLONE = 2**20  # below this a clone saves nothing and fragments the file
_MIN_WRITE_BACK = 2**23
_FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range)

# Where the server copies, unaligned or not, and nothing crosses the network.
_SERVER_COPIES = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "fuse"})

# What a rung answers when it will not work between these two file systems at all.
_UNSUPPORTED = frozenset(
    {
        errno.EINVAL,
        errno.ENOSYS,
        errno.ENOTTY,
        errno.EOPNOTSUPP,
        errno.EPERM,  # a container's system call filter
        errno.EXDEV,
    }
)


@dataclass(frozen=True, slots=True)
class _Span:
    """`length` bytes to bring from one open file to another."""

    src: int
    src_offset: int
    dst: int
    dst_offset: int
    length: int

    def part(self, begin: int, end: int) -> "_Span":
        return _Span(
            self.src, self.src_offset + begin, self.dst, self.dst_offset + begin, end - begin
        )

    def keeps_pages(self) -> bool:
        """Whether whole pages of the source become whole pages of the target."""
        return (self.src_offset - self.dst_offset) % mmap.PAGESIZE == 0


class Method(str, Enum):
    """A rung of the ladder, best first."""

    REFLINK = "reflink"
    COPY_FILE_RANGE = "copy_file_range"
    SENDFILE = "sendfile"
    READ_WRITE = "read_write"


class Copier:
    """Copies byte ranges by the best method that works, and counts what each method moved.

    Remembers for each pair of devices which methods were refused. Use one per thread.
    """

    def __init__(self, methods: Collection[Method] = tuple(Method), *, step: int = STEP) -> None:
        """
        Args:
            methods: the rungs that may be used. read_write is the last resort even if it is not
                among them, and then never preferred.
            step: bytes per system call at most.
        """
        last: dict[Method, _Mover] = {Method.READ_WRITE: _read_write}
        self._movers = {m: mover for m, mover in _MOVERS.items() if m in methods} | last
        self._unaligned_movers = last if Method.READ_WRITE in methods else self._movers
        self._clones = Method.REFLINK in methods and sys.platform == "linux"
        self._step = step
        self._refused: dict[tuple[int, int], set[Method]] = {}
        self._copied_by_server: dict[int, bool] = {}
        self._moved: Counter[Method] = Counter()

    @property
    def moved(self) -> Mapping[Method, int]:
        """Bytes moved so far by each method that moved any."""
        return dict(self._moved)

    def copy(
        self,
        src: int,
        src_offset: int,
        dst: int,
        dst_offset: int,
        length: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Copy `length` bytes between two open files; the ranges must not overlap.

        `dst` grows as needed. Its file position is left anywhere; that of `src` is left alone.

        Args:
            src: file descriptor open for reading.
            src_offset: byte to start reading at.
            dst: file descriptor open for writing, not in append mode.
            dst_offset: byte to start writing at.
            length: bytes to copy.
            progress: called after each step with the bytes it moved.

        Raises:
            CheckpointError: the source ends before the range does.
            HostError: no space left, or another failure to read or write.
            ValueError: `dst` is in append mode, where offsets are ignored.
        """
        if fcntl.fcntl(dst, fcntl.F_GETFL) & os.O_APPEND:
            raise ValueError("cannot copy to given offsets of a file in append mode")
        span = _Span(src, src_offset, dst, dst_offset, length)
        begin, end = self._clone(span)
        self._count(Method.REFLINK, end - begin, progress)
        self._move(span.part(0, begin), progress)
        self._move(span.part(end, length), progress)

    def _clone(self, span: _Span) -> tuple[int, int]:
        """Reflink what block alignment allows; the part of the span that is done."""
        refused = self._refusals(span)
        if not self._clones or Method.REFLINK in refused:
            return 0, 0
        begin, end = _clonable(span)
        if end - begin < _MIN_CLONE:
            return 0, 0
        try:
            _ficlonerange(span.part(begin, end))
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                refused.add(Method.REFLINK)
            return 0, 0
        return begin, end

    def _move(self, span: _Span, progress: Callable[[int], None] | None) -> None:
        done = 0
        refused = self._refusals(span)
        for method, mover in self._movers_for(span).items():
            if method in refused:
                continue
            try:
                while done < span.length:
                    count = mover(span.part(done, min(span.length, done + self._step)))
                    if count == 0:
                        break
                    _start_writing_back(span.dst, span.dst_offset + done, count)
                    done += count
                    self._count(method, count, progress)
            except OSError as error:
                if method is Method.READ_WRITE:
                    raise _explain(error, span, done) from None
                if error.errno in _UNSUPPORTED:
                    refused.add(method)
            if done == span.length:
                return
        # Only a read that finds the end is believed: copy_file_range and sendfile also return 0
        # for files whose size the kernel does not know.
        raise CheckpointError(
            f"{_name(span.src)}: shrank while it was copied; let its writer finish and start again"
        )

    def _movers_for(self, span: _Span) -> "dict[Method, _Mover]":
        if span.keeps_pages():
            return self._movers
        device = os.fstat(span.dst).st_dev
        if device not in self._copied_by_server:
            self._copied_by_server[device] = _file_system(device) in _SERVER_COPIES
        return self._movers if self._copied_by_server[device] else self._unaligned_movers

    def _refusals(self, span: _Span) -> set[Method]:
        devices = os.fstat(span.src).st_dev, os.fstat(span.dst).st_dev
        return self._refused.setdefault(devices, set())

    def _count(self, method: Method, count: int, progress: Callable[[int], None] | None) -> None:
        if count:
            self._moved[method] += count
            if progress is not None:
                progress(count)


def data_runs(src: int, run: Run) -> Iterator[Run]:
    """The parts of `run` that hold data; what lies between them are holes, which read as zeros.

    A file system that knows no holes calls everything data (lseek(2), SEEK_DATA).
    """
    position, end = run.source, run.source + run.length
    while position < end:
        try:
            begin = os.lseek(src, position, os.SEEK_DATA)
            stop = min(end, os.lseek(src, begin, os.SEEK_HOLE)) if begin < end else end
        except OSError as error:
            if error.errno == errno.ENXIO and position < os.fstat(src).st_size:
                return  # nothing but a hole up to the end of the file
            begin, stop = position, end  # not known, or beyond the end: the copy finds out
        if begin < end:
            yield Run(begin, begin - run.source + run.target, stop - begin)
        position = stop


def hole_bytes(path: Path, size: int) -> int:
    """How many bytes of a file are in holes; 0 for one that cannot be opened."""
    try:
        file = open_regular(path)
    except (CheckpointError, HostError):
        return 0  # whoever reads it reports why
    with file:
        if os.fstat(file.fileno()).st_blocks * 512 >= size:
            return 0
        return size - sum(run.length for run in data_runs(file.fileno(), Run(0, 0, size)))


def _clonable(span: _Span) -> tuple[int, int]:
    """The part of a span that consists of whole blocks on both sides."""
    block = os.fstatvfs(span.dst).f_bsize
    if (span.src_offset - span.dst_offset) % block:
        return 0, 0
    begin, end = -span.src_offset % block, span.length
    ends_source = span.src_offset + end == os.fstat(span.src).st_size
    ends_target = span.dst_offset + end >= os.fstat(span.dst).st_size
    if not (ends_source and ends_target):  # only a file's last block may be shared in part
        end -= (span.src_offset + end) % block
    return begin, max(begin, end)


def _ficlonerange(span: _Span) -> None:
    request = struct.pack("=qQQQ", span.src, span.src_offset, span.length, span.dst_offset)
    fcntl.ioctl(span.dst, _FICLONERANGE, request)


def _copy_file_range(span: _Span) -> int:
    return os.copy_file_range(span.src, span.dst, span.length, span.src_offset, span.dst_offset)


def _sendfile(span: _Span) -> int:
    os.lseek(span.dst, span.dst_offset, os.SEEK_SET)
    return os.sendfile(span.dst, span.src, span.src_offset, span.length)


def _read_write(span: _Span) -> int:
    done = 0
    while done < span.length:
        # The first piece ends where a buffer's worth of the target does: later ones fill whole
        # pages.
        size = min(span.length - done, _BUFFER - (span.dst_offset + done) % _BUFFER)
        data = memoryview(os.pread(span.src, size, span.src_offset + done))
        if not data:
            break
        done += os.pwrite(span.dst, data, span.dst_offset + done)
    return done


def _start_writing_back(fd: int, offset: int, length: int) -> None:
    """Let the disk work while the next part is copied, not only when the file is synced.

    On Linux the advice starts writing dirty pages out and waits for nothing; as they are dirty, it
    does not drop them.
    """
    if length >= _MIN_WRITE_BACK and sys.platform == "linux":
        with suppress(OSError):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


_Mover = Callable[[_Span], int]

# Elsewhere copy_file_range does not exist, and sendfile only writes to sockets.
_MOVERS: dict[Method, _Mover] = (
    {Method.COPY_FILE_RANGE: _copy_file_range, Method.SENDFILE: _sendfile}
    if sys.platform == "linux"
    else {}
)


def _file_system(device: int) -> str:
    """The kind of file system that is mounted from a device; empty if that is not known."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for fields in map(str.split, mounts):
                if fields[2] == wanted:
                    return fields[fields.index("-") + 1].partition(".")[0]
    except OSError:
        pass
    return ""


def _explain(error: OSError, span: _Span, done: int) -> GemmaFoldError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HostError(
            f"{_name(span.dst)}: no space left with {span.length - done} bytes of this part to "
            "write; free some space, or write to another disk"
        )
    return HostError(
        f"cannot copy {_name(span.src)} to {_name(span.dst)} ({error.strerror}); check both disks"
    )


def _name(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"file descriptor {fd}"
