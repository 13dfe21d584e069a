"""The copy ladder on real file systems: every rung gives the same bytes, and falls as it should."""

import errno
import fcntl
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mounts import mounted

from gemma_fold.checkpoint import copy
from gemma_fold.checkpoint.copy import Copier, Method
from gemma_fold.errors import CheckpointError, HostError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the ladder's rungs are Linux's")

KERNEL_RUNGS = [Method.COPY_FILE_RANGE, Method.SENDFILE]
BLOCK = 4096
MIB = 2**20


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@contextmanager
def opened(src: Path, dst: Path) -> Iterator[tuple[int, int]]:
    source = os.open(src, os.O_RDONLY)
    target = os.open(dst, os.O_RDWR | os.O_CREAT)
    try:
        yield source, target
    finally:
        os.close(source)
        os.close(target)


def error_of(attempt: Callable[[], object]) -> int | None:
    try:
        attempt()
    except OSError as error:
        return error.errno
    return None


# Every rung


@pytest.mark.parametrize("step", [1000, 64 * MIB])
@pytest.mark.parametrize("method", [*KERNEL_RUNGS, Method.READ_WRITE])
@pytest.mark.parametrize(
    ("src_offset", "dst_offset", "length"),
    [(0, 0, 3 * MIB + 17), (13, 4097, 2 * MIB + 1), (4096, 8192, MIB), (7, 3, 1), (5, 5, 0)],
)
def test_each_method_copies_exactly_the_range(
    tmp_path: Path, method: Method, step: int, src_offset: int, dst_offset: int, length: int
) -> None:
    content, before = noise(4 * MIB), noise(5 * MIB)
    (tmp_path / "src").write_bytes(content)
    (tmp_path / "dst").write_bytes(before)
    length = min(length, 50_000) if step < length else length
    copier, steps = Copier([method], step=step), list[int]()
    with opened(tmp_path / "src", tmp_path / "dst") as (src, dst):
        copier.copy(src, src_offset, dst, dst_offset, length, steps.append)
        assert os.lseek(src, 0, os.SEEK_CUR) == 0
    expected = bytearray(before)
    expected[dst_offset : dst_offset + length] = content[src_offset : src_offset + length]
    assert (tmp_path / "dst").read_bytes() == expected
    assert (tmp_path / "src").read_bytes() == content
    assert copier.moved == ({method: length} if length else {})
    assert sum(steps) == length
    assert all(0 < count <= step for count in steps)


@pytest.mark.parametrize("method", [*KERNEL_RUNGS, Method.READ_WRITE])
def test_the_target_grows_and_the_gap_reads_as_zeros(tmp_path: Path, method: Method) -> None:
    (tmp_path / "src").write_bytes(noise(10_000))
    with opened(tmp_path / "src", tmp_path / "dst") as (src, dst):
        Copier([method]).copy(src, 1, dst, 5000, 9000)
    assert (tmp_path / "dst").read_bytes() == bytes(5000) + noise(10_000)[1:9001]


@pytest.mark.parametrize("method", [*KERNEL_RUNGS, Method.READ_WRITE])
def test_offsets_beyond_4_gib(tmp_path: Path, method: Method) -> None:
    at, to = 5 * 2**30 + 3, 6 * 2**30 + 1
    with open(tmp_path / "src", "wb") as file:
        file.seek(at)
        file.write(noise(100_000))
    copier = Copier([method])
    with opened(tmp_path / "src", tmp_path / "dst") as (src, dst):
        copier.copy(src, at, dst, to, 100_000)
        assert os.pread(dst, 200_000, to) == noise(100_000)
        assert os.fstat(dst).st_size == to + 100_000
    assert copier.moved == {method: 100_000}


# Falling down the ladder


def test_reflink_is_tried_once_and_then_left_alone(tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(noise(4 * MIB))
    with opened(tmp_path / "src", tmp_path / "dst") as (src, dst):
        if error_of(lambda: fcntl.ioctl(dst, 0x40049409, src)) is None:
            pytest.skip("this file system shares blocks; test_reflink_on_a_real_image covers it")
        os.ftruncate(dst, 0)
        copier = Copier()
        copier.copy(src, 0, dst, 0, 4 * MIB)
        copier.copy(src, 0, dst, 4 * MIB, 4 * MIB)
    assert (tmp_path / "dst").read_bytes() == noise(4 * MIB) * 2
    assert copier.moved == {Method.COPY_FILE_RANGE: 8 * MIB}


def test_between_two_kinds_of_file_system(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a writable /dev/shm on another device than the temporary folder")
    source = shm / f"gemma-fold-test-{os.getpid()}"
    source.write_bytes(noise(2 * MIB))
    try:
        with opened(source, tmp_path / "dst") as (src, dst):
            refused = error_of(lambda: os.copy_file_range(src, dst, 1, 0, 0)) is not None
            copier = Copier()
            copier.copy(src, 1, dst, 1, 2 * MIB - 1)
    finally:
        source.unlink()
    assert (tmp_path / "dst").read_bytes()[1:] == noise(2 * MIB)[1:]
    used = Method.SENDFILE if refused else Method.COPY_FILE_RANGE
    assert copier.moved == {used: 2 * MIB - 1}


def test_pages_that_would_be_cut_in_two_go_through_a_buffer(tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(noise(3 * MIB))
    copier = Copier(step=MIB)
    with opened(tmp_path / "src", tmp_path / "dst") as (src, dst):
        copier.copy(src, 100, dst, 108, 2 * MIB)
        copier.copy(src, 0, dst, BLOCK * 1000, MIB - 1)
    expected = bytes(108) + noise(3 * MIB)[100 : 2 * MIB + 100]
    expected = expected.ljust(BLOCK * 1000, b"\0") + noise(3 * MIB)[: MIB - 1]
    assert (tmp_path / "dst").read_bytes() == expected
    assert copier.moved == {Method.READ_WRITE: 2 * MIB, Method.COPY_FILE_RANGE: MIB - 1}


def test_where_a_server_copies_it_does_so_unaligned_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played by whatever file system is here, under the name that findmnt gives it."""
    command = ["findmnt", "--noheadings", "--output=FSTYPE", "--target", str(tmp_path)]
    kind = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if kind == "btrfs":
        pytest.skip("btrfs gives its files other device numbers than its mounts")
    monkeypatch.setattr(copy, "_SERVER_COPIES", {kind})
    (tmp_path / "src").write_bytes(noise(MIB))
    copier = Copier()
    with opened(tmp_path / "src", tmp_path / "dst") as (src, dst):
        copier.copy(src, 1, dst, 0, MIB - 1)
    assert copier.moved == {Method.COPY_FILE_RANGE: MIB - 1}


def test_a_file_whose_size_the_kernel_does_not_know(tmp_path: Path) -> None:
    """procfs says 0 bytes; copy_file_range may return 0 there though there is content."""
    content = Path("/proc/version").read_bytes()
    with opened(Path("/proc/version"), tmp_path / "dst") as (src, dst):
        Copier().copy(src, 0, dst, 0, len(content))
    assert (tmp_path / "dst").read_bytes() == content


@pytest.mark.parametrize(
    "code", [errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.EIO]
)
def test_errors_no_file_system_here_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Old kernels, system call filters and network file systems, played by stand-ins."""
    calls = []

    def refuse(*_: object) -> int:
        calls.append(code)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(os, "sendfile", refuse)
    (tmp_path / "src").write_bytes(noise(10_000))
    copier = Copier([*KERNEL_RUNGS])
    with opened(tmp_path / "src", tmp_path / "dst") as (src, dst):
        for part in (0, 5000):
            copier.copy(src, part, dst, part, 5000)
    assert (tmp_path / "dst").read_bytes() == noise(10_000)
    assert copier.moved == {Method.READ_WRITE: 10_000}
    # An input/output error may pass; the others mean never.
    assert len(calls) == (4 if code == errno.EIO else 2)


def test_a_rung_that_breaks_off_midway_is_continued_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.copy_file_range

    def short_then_broken(src: int, dst: int, count: int, at: int, to: int) -> int:
        if at >= 2000:
            raise OSError(errno.EIO, "stand-in")
        return real(src, dst, min(count, 1000), at, to)

    monkeypatch.setattr(os, "copy_file_range", short_then_broken)
    (tmp_path / "src").write_bytes(noise(10_000))
    copier = Copier()
    with opened(tmp_path / "src", tmp_path / "dst") as (src, dst):
        copier.copy(src, 0, dst, 0, 10_000)
    assert (tmp_path / "dst").read_bytes() == noise(10_000)
    assert copier.moved == {Method.COPY_FILE_RANGE: 2000, Method.SENDFILE: 8000}


# Failing


@pytest.mark.parametrize("method", [*KERNEL_RUNGS, Method.READ_WRITE])
def test_a_source_that_shrinks_while_it_is_copied(tmp_path: Path, method: Method) -> None:
    (tmp_path / "src").write_bytes(noise(10_000))
    with opened(tmp_path / "src", tmp_path / "dst") as (src, dst):
        shrink = lambda _: os.truncate(tmp_path / "src", 5000)  # noqa: E731
        with pytest.raises(CheckpointError, match=r"src: shrank while it was copied"):
            Copier([method], step=4000).copy(src, 0, dst, 0, 10_000, shrink)


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(noise(10_000))
    with (
        opened(tmp_path / "src", Path("/dev/full")) as (src, dst),
        pytest.raises(HostError, match=r"/dev/full: no space left with 9000 bytes"),
    ):
        Copier().copy(src, 0, dst, 0, 9000)


def test_a_disk_that_fills_up_midway(tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(noise(3 * MIB))
    (tmp_path / "small").mkdir()
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        for method in (*KERNEL_RUNGS, Method.READ_WRITE):
            with (
                opened(tmp_path / "src", tmp_path / "small" / method.value) as (src, dst),
                pytest.raises(HostError, match=r"no space left with \d+ bytes"),
            ):
                Copier([method]).copy(src, 0, dst, 0, 3 * MIB)
            (tmp_path / "small" / method.value).unlink()


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(noise(100))
    src = os.open(tmp_path / "src", os.O_RDONLY)
    with pytest.raises(HostError, match=r"cannot copy .*src to .*src"):
        Copier().copy(src, 0, src, 200, 100)
    os.close(src)


def test_append_mode_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(noise(100))
    (tmp_path / "dst").write_bytes(b"kept")
    src = os.open(tmp_path / "src", os.O_RDONLY)
    dst = os.open(tmp_path / "dst", os.O_WRONLY | os.O_APPEND)
    with pytest.raises(ValueError, match="append"):
        Copier().copy(src, 0, dst, 0, 100)
    os.close(src)
    os.close(dst)
    assert (tmp_path / "dst").read_bytes() == b"kept"


def test_an_interrupt_in_the_progress_callback_gets_through(tmp_path: Path) -> None:
    (tmp_path / "src").write_bytes(noise(10_000))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with (
        opened(tmp_path / "src", tmp_path / "dst") as (src, dst),
        pytest.raises(KeyboardInterrupt),
    ):
        Copier(step=1000).copy(src, 0, dst, 0, 10_000, interrupt)
    assert (tmp_path / "dst").stat().st_size == 1000


# Reflinks, on images of file systems that have them


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def image(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A mounted, empty file system that can share blocks."""
    mkfs = shutil.which(f"mkfs.{request.param}", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if mkfs is None:
        pytest.skip(f"needs mkfs.{request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    with open(folder / "image", "wb") as file:
        file.truncate(512 * MIB)
    subprocess.run([mkfs, "-q", folder / "image"], check=True)
    (folder / "mount").mkdir()
    with mounted(folder / "mount", "-o", "loop", str(folder / "image")):
        yield folder / "mount"


@pytest.mark.parametrize(
    ("src_offset", "dst_offset", "length", "shared"),
    [
        pytest.param(0, 0, 4 * MIB + 5, 4 * MIB + 5, id="whole file with an odd end"),
        pytest.param(BLOCK, 3 * BLOCK, 2 * MIB, 2 * MIB, id="aligned"),
        pytest.param(100, BLOCK + 100, 3 * MIB, 3 * MIB - BLOCK, id="head and tail by hand"),
        pytest.param(0, 8, 4 * MIB, 0, id="not aligned with each other"),
    ],
)
def test_reflink_on_a_real_image(
    image: Path, src_offset: int, dst_offset: int, length: int, shared: int
) -> None:
    content = noise(4 * MIB + 5)
    (image / "src").write_bytes(content)
    (image / "dst").write_bytes(b"")
    copier, steps = Copier(), list[int]()
    with opened(image / "src", image / "dst") as (src, dst):
        copier.copy(src, src_offset, dst, dst_offset, length, steps.append)
        os.fsync(dst)
    expected = bytes(dst_offset) + content[src_offset : src_offset + length]
    assert (image / "dst").read_bytes() == expected
    aligned = (src_offset - dst_offset) % BLOCK == 0
    by_hand = Method.COPY_FILE_RANGE if aligned else Method.READ_WRITE
    rest = {by_hand: length - shared} if length > shared else {}
    assert copier.moved == ({Method.REFLINK: shared} | rest if shared else rest)
    assert sum(steps) == length
    assert has_shared_blocks(image / "dst") == bool(shared)


def has_shared_blocks(path: Path) -> bool:
    """What the file system itself reports, through filefrag."""
    listing = subprocess.run(["filefrag", "-v", path], capture_output=True, text=True, check=True)
    return "shared" in listing.stdout


def test_reflink_into_the_middle_of_a_longer_file_keeps_what_follows(image: Path) -> None:
    content, before = noise(2 * MIB + 5), noise(6 * MIB)
    (image / "src").write_bytes(content)
    (image / "dst").write_bytes(before)
    copier = Copier()
    with opened(image / "src", image / "dst") as (src, dst):
        copier.copy(src, 0, dst, BLOCK, len(content))
    assert (image / "dst").read_bytes() == before[:BLOCK] + content + before[BLOCK + len(content) :]
    assert copier.moved == {Method.REFLINK: 2 * MIB, Method.COPY_FILE_RANGE: 5}


def test_a_clone_does_not_follow_later_writes_to_the_source(image: Path) -> None:
    content = noise(2 * MIB)
    (image / "src").write_bytes(content)
    (image / "dst").unlink(missing_ok=True)
    with opened(image / "src", image / "dst") as (src, dst):
        Copier([Method.REFLINK]).copy(src, 0, dst, 0, 2 * MIB)
    with open(image / "src", "r+b") as file:
        file.write(b"\0" * MIB)
    assert (image / "dst").read_bytes() == content
