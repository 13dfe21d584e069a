"""Whatever stops a conversion, OUT is absent or complete, and --resume finishes the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import patience
import pytest
from checkpoints import gemma3_tensors, tree, write_checkpoint

from gemma_fold.checkpoint.progress import Progress
from gemma_fold.checkpoint.staging import work_folder
from gemma_fold.commands.convert import convert
from gemma_fold.commands.unfold import unfold
from gemma_fold.commands.verify import verify
from gemma_fold.errors import CheckpointError, HostError, UsageError

# Runs a conversion that dies by SIGKILL at its n-th event: a file begun, or bytes written.
DYING = """
import os, signal, sys
from gemma_fold.commands.{module} import {module} as run
from gemma_fold.checkpoint.progress import Progress

class Dying(Progress):
    left = int(sys.argv[3])
    def step(self, *event):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    file = advance = finish = step

run(sys.argv[1], sys.argv[2], resume=len(sys.argv) > 4, progress=Dying())
"""


def die_at(event: int, source: Path, out: Path, *resume: str, module: str = "convert") -> int:
    script = DYING.format(module=module)
    command = [sys.executable, "-c", script, str(source), str(out), str(event), *resume]
    return subprocess.run(command, timeout=patience.seconds(120), check=False).returncode


@pytest.mark.slow
def test_killed_at_any_event_then_resumed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=2)
    convert(source, tmp_path / "expected")
    expected = tree(tmp_path / "expected")
    kills = 0
    for event in range(0, 1000, 3):
        out = tmp_path / f"out{event}"
        if die_at(event, source, out) == 0:
            assert tree(out) == expected
            break
        kills += 1
        assert not out.exists()
        with pytest.raises(UsageError, match="--resume"):
            convert(source, out)
        convert(source, out, resume=True)
        assert tree(out) == expected
        assert not work_folder(out).exists()
    assert kills >= 5


@pytest.mark.slow
def test_killed_again_while_resuming(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=3)
    out = tmp_path / "out"
    assert die_at(2, source, out) == -signal.SIGKILL
    for event in (1, 3, 5):
        assert die_at(event, source, out, "--resume") == -signal.SIGKILL
        assert not out.exists()
    convert(source, out, resume=True)
    assert verify(out, against=source).ok


def test_resuming_does_not_write_finished_files_again(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=4)
    out = tmp_path / "out"
    first = "model-00001-of-00004.safetensors"
    assert die_at(12, source, out) == -signal.SIGKILL
    before = (work_folder(out) / "new" / first).stat()
    convert(source, out, resume=True)
    after = (out / first).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_resume_with_another_source_or_option_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    out = tmp_path / "out"
    assert die_at(3, source, out) == -signal.SIGKILL
    with pytest.raises(UsageError, match="start over with --restart"):
        convert(source, out, resume=True, tensor_lock=False)
    write_checkpoint(source, gemma3_tensors(seed=1))
    with pytest.raises(UsageError, match="start over with --restart"):
        convert(source, out, resume=True)
    convert(source, out, restart=True)
    assert verify(out, against=source).ok


def test_unfold_killed_then_resumed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=2)
    convert(source, tmp_path / "out")
    back = tmp_path / "back"
    assert die_at(3, tmp_path / "out", back, module="unfold") == -signal.SIGKILL
    assert not back.exists()
    unfold(tmp_path / "out", back, resume=True)
    assert tree(back) == tree(source)


class At(Progress):
    """Calls `action` once, when the second file begins."""

    def __init__(self, action: object) -> None:
        self.action = action

    def file(self, name: str, number: int) -> None:
        if number == 2 and callable(self.action):
            self.action()


def test_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=3)
    shard = source / "model-00002-of-00003.safetensors"

    def rewrite() -> None:
        shard.write_bytes(shard.read_bytes())

    with pytest.raises(CheckpointError, match="changed while it was read"):
        convert(source, tmp_path / "out", progress=At(rewrite))
    assert sorted(tmp_path.iterdir()) == [source]


def test_source_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=3)
    shard = source / "model-00002-of-00003.safetensors"
    with pytest.raises(CheckpointError, match=r"shrank|changed"):
        convert(source, tmp_path / "out", progress=At(lambda: os.truncate(shard, 600)))
    assert sorted(tmp_path.iterdir()) == [source]


def test_two_converters_on_one_output(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=3)
    out = tmp_path / "out"
    results: list[subprocess.CompletedProcess[str]] = []

    def second() -> None:
        for option in ("--resume", "--restart", "--force"):
            command = [sys.executable, "-m", "gemma_fold", "convert", source, "-o", out, option]
            results.append(subprocess.run(command, capture_output=True, text=True, check=False))

    convert(source, out, progress=At(second))
    assert [result.returncode for result in results] == [2, 2, 2]
    assert all("another process is writing" in result.stderr for result in results)
    assert verify(out, against=source).ok


# The command line, interrupted by a real SIGINT when its second file begins.
INTERRUPTED = """
import os, signal, sys
from gemma_fold import cli
from gemma_fold.commands import render

# Whoever starts the tests in the background may have it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupted(render.ProgressBar):
    def file(self, name, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)

render.ProgressBar = Interrupted
cli.main()
"""


def test_ctrl_c(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=3)
    out = tmp_path / "out"
    command = [sys.executable, "-c", INTERRUPTED, "convert", source, "-o", out]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 130
    assert result.stderr.strip().count("\n") == 0 and "--resume" in result.stderr
    assert not out.exists()
    convert(source, out, resume=True)
    assert verify(out, against=source).ok


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_too_little_space_is_seen_before_anything_is_written(
    tmp_path: Path, small_disk: Path
) -> None:
    source = write_checkpoint(tmp_path / "model")
    (source / "large.bin").write_bytes(bytes(4 << 20))
    with pytest.raises(HostError, match=r"not enough space.* needed, .* free"):
        convert(source, small_disk / "out")
    assert not any(small_disk.iterdir())


def test_disk_that_fills_up_midway(tmp_path: Path, small_disk: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=3)
    (source / "large.txt").write_bytes(bytes(1 << 20))
    ballast = small_disk / "ballast"

    def fill() -> None:
        with pytest.raises(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()

    with pytest.raises(HostError, match="space") as error:
        convert(source, small_disk / "out", progress=At(fill))
    assert "\n" not in str(error.value)
    assert not (small_disk / "out").exists()
    ballast.unlink()
    convert(source, small_disk / "out", resume=True)
    assert verify(small_disk / "out", against=source).ok


def test_read_only_target(tmp_path: Path, small_disk: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(HostError, match=r"cannot write .*; choose a writable disk"):
        convert(source, small_disk / "out")
