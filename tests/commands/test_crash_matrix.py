"""Every command, killed or failed at every one of its file system calls (tests/crash).

The counts of trials are printed (pytest -s) and, with CRASH_MATRIX_JSON=FILE in the environment,
appended to that file. CRASH_MATRIX_FULL=1 plays every fault at every call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import read_tensors, write_checkpoint
from crash.matrix import file_system
from crash.scenes import SCENES
from crash.shim import build, compiler
from mounts import mounted

from gemma_fold.commands.convert import convert
from gemma_fold.commands.verify import verify

TESTS = Path(__file__).resolve().parents[1]
LINUX = sys.platform == "linux"
pytestmark = [
    pytest.mark.skipif(not LINUX, reason="the shim wraps the calls of Linux's C library"),
    pytest.mark.skipif(compiler() is None, reason="needs a C compiler (cc) to build the shim"),
]
FULL = os.environ.get("CRASH_MATRIX_FULL") == "1"
EVERY_KILL = ("--fault", "kill", "--fault", "kill after half a write")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("shim") / "shim.so")


def start(shim: Path, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a driver; pytest's own process is never under the shim."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "support"))),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "crash.matrix", str(folder), *arguments]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def play(shim: Path, folder: Path, scenes: Sequence[str], *arguments: str) -> list[dict[str, Any]]:
    """Play scenes, spread over the processors; every trial has to have gone well."""
    workers = min(len(scenes), len(os.sched_getaffinity(0)))
    shares = [scenes[number::workers] for number in range(workers)]
    drivers = [
        start(shim, folder, *(word for scene in share for word in ("--scene", scene)), *arguments)
        for share in shares
    ]
    ends = [driver.communicate() for driver in drivers]
    assert all(output for output, _ in ends), [errors for _, errors in ends]
    reports = [json.loads(output) for output, _ in ends]
    check(reports)
    return reports


def check(reports: Sequence[dict[str, Any]]) -> None:
    """No trial may have found a problem."""
    show(reports)
    failures = [failure for found in reports for failure in found["failures"]]
    assert not failures, f"{len(failures)} trials failed:\n" + "\n".join(failures[:20])


def show(reports: Sequence[dict[str, Any]]) -> None:
    """Print what was tried, and write it where CRASH_MATRIX_JSON says."""
    trials = sum(found["trials"] for found in reports)
    print(f"{trials} trials, {sum(found['cells'] for found in reports)} cells,", end=" ")
    print(f"{reports[0]['file_system']}, {max(found['seconds'] for found in reports):.0f} s")
    for scene, counts in sorted(c for found in reports for c in found["counts"].items()):
        print(f"  {scene}:", ", ".join(f"{fault} {n}" for fault, n in counts.items()))
    if target := os.environ.get("CRASH_MATRIX_JSON"):
        path = Path(target)
        earlier = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*earlier, *reports], indent=1) + "\n")


def test_the_reference_is_right(tmp_path: Path) -> None:
    """What every trial is compared with: by `verify`, and by the definition, 1 + w."""
    source = write_checkpoint(tmp_path / "model", shards=2)
    convert(source, tmp_path / "folded")
    assert verify(tmp_path / "folded", against=source).ok
    plain, folded = read_tensors(source), read_tensors(tmp_path / "folded")
    assert plain.keys() == folded.keys()
    for name, tensor in plain.items():
        if name.endswith("norm.weight"):
            gamma = (1.0 + tensor.astype("float64")).astype("float32")
            assert (folded[name].reshape(-1) == gamma).all()
        else:
            assert folded[name].tobytes() == tensor.tobytes()


@pytest.mark.slow
def test_sample(shim: Path, tmp_path: Path) -> None:
    """Kills and full disks at a few calls of two commands."""
    faults = (
        "--fault",
        "kill",
        "--fault",
        "ENOSPC",
        "--kills",
        "12",
        "--errors",
        "16",
        "--every",
        "50",
    )
    reports = play(shim, tmp_path, ["convert", "convert --force"], *faults)
    assert sum(found["trials"] for found in reports) > 20


def test_the_shim_sees_the_calls_that_matter(shim: Path, tmp_path: Path) -> None:
    """A call that the shim does not know of would be a hole in the matrix."""
    driver = start(shim, tmp_path, "--calls", "--scene", "convert --force")
    output, errors = driver.communicate()
    assert driver.returncode == 0, errors
    seen = Counter(line.split("\t")[0] for line in output.splitlines())
    traced = {"open", "close", "read", "write", "mkdir", "unlink", "rmdir", "exchange", "fsync"}
    assert traced <= seen.keys(), seen


@pytest.mark.slow
def test_everything(shim: Path, tmp_path: Path) -> None:
    """Every kill, and each call that changes something with some of the errors; or with all."""
    thin = ("--every", "24", "--errors", "6")
    reports = play(shim, tmp_path, list(SCENES), *(() if FULL else thin))
    assert sum(found["trials"] for found in reports) > 2000


@pytest.mark.slow
def test_save_pretrained(shim: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    thin = ("--every", "30", "--kills", "2", "--errors", "6")
    driver = start(shim, tmp_path, "--save", *(() if FULL else thin))
    output, errors = driver.communicate()
    assert output, errors
    check([json.loads(output)])


@pytest.mark.slow
def test_kills_in_memory(shim: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or file_system(memory) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    play(shim, memory, ["convert", "convert --force", "unfold"], *EVERY_KILL, "--every", "24")


@pytest.fixture(params=["xfs", "btrfs"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mounted, empty file system of another kind."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    mkfs = f"mkfs.{request.param}"
    if not any(os.access(Path(folder, mkfs), os.X_OK) for folder in path.split(":")):
        pytest.skip(f"needs {mkfs}")
    with open(tmp_path / "image", "wb") as file:
        file.truncate(512 << 20)
    subprocess.run([mkfs, "-q", tmp_path / "image"], check=True, env={"PATH": path})
    (tmp_path / "mount").mkdir()
    with mounted(tmp_path / "mount", "-o", "loop", str(tmp_path / "image")):
        yield tmp_path / "mount"


@pytest.mark.slow
def test_kills_on_other_file_systems(shim: Path, image: Path) -> None:
    play(shim, image, ["convert", "convert --force", "unfold"], *EVERY_KILL, "--every", "24")
