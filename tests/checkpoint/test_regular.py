"""Files that somebody names are opened in one way: regular ones only, without waiting."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import gemma_fold
from gemma_fold.checkpoint.copy import hole_bytes
from gemma_fold.checkpoint.folder import open_folder
from gemma_fold.checkpoint.header import read_header
from gemma_fold.checkpoint.regular import open_regular
from gemma_fold.checkpoint.source import read_small
from gemma_fold.compare.files.arrays import open_arrays
from gemma_fold.compare.files.gguf import read_gguf
from gemma_fold.errors import CheckpointError, HostError

READERS: dict[str, Callable[[Path], object]] = {
    "header": read_header,
    "text": read_small,
    "gguf": read_gguf,
    "array": lambda path: open_arrays([f"norm={path}"]),
}
reads = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@reads
def test_all_readers_say_the_same(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "none", "no such file; fetch it, or correct the path"),
        (tmp_path / "pipe", "not a regular file; correct the path"),
        (tmp_path, "not a regular file; correct the path"),
        (tmp_path / "pipe" / "below", "no such file; fetch it, or correct the path"),
        (Path("/dev/zero"), "not a regular file; correct the path"),
    ):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert str(caught.value) == f"{path}: {words}"


@reads
def test_what_the_system_refuses(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "loop"
    path.symlink_to(path)
    with pytest.raises(HostError) as caught:
        read(path)
    words = "cannot be read (Too many levels of symbolic links); check its permissions and the disk"
    assert str(caught.value) == f"{path}: {words}"


def test_only_one_module_opens_without_waiting() -> None:
    package = Path(gemma_fold.__file__).parent
    found = [path.name for path in package.rglob("*.py") if "O_NONBLOCK" in path.read_text()]
    assert found == ["regular.py"]


def test_holes_of_what_cannot_be_opened_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "pipe", "."):
        assert hole_bytes(tmp_path / name, 1 << 20) == 0
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 20)
    assert hole_bytes(tmp_path / "sparse", 1 << 20) == 1 << 20


def test_a_folder_opens_a_pipe_without_waiting_and_follows_no_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with open_folder(tmp_path) as folder:
        os.close(folder.read("pipe"))
        with pytest.raises(OSError, match="symbolic links"):
            folder.read("link")


def test_nothing_stays_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"content")
    before = os.listdir("/proc/self/fd")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError):
            open_regular(path)
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"content"
        assert not os.get_inheritable(file.fileno())
    assert os.listdir("/proc/self/fd") == before


def test_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(HostError, match="cannot be read"):
            open_regular(Path("socket"))
