"""A Hub id that is converted shard by shard: the same result, and little of the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import patience
import pytest
from checkpoints import gemma3_tensors, tree, write_checkpoint
from commands import run
from hubserver import HubServer

PAYLOAD = 3 << 20  # bytes of the largest tensor


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = gemma3_tensors()
    rng = np.random.default_rng(5)
    for layer in range(3):
        noise = rng.integers(0, 1 << 16, (PAYLOAD // 2048, 1024), dtype=np.uint16)
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = noise.view(np.float16)
    folder = write_checkpoint(tmp_path / "model", tensors, shards=4)
    (folder / "pytorch_model.bin").write_bytes(b"not needed" * 1000)
    return folder


@pytest.fixture
def hub(source: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/tiny", source)
        yield server


def environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    return os.environ | hub.environment(tmp_path / "home")


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.mark.slow
def test_the_result_is_that_of_a_download(hub: HubServer, source: Path, tmp_path: Path) -> None:
    env = environment(hub, tmp_path)
    done = run("convert", "org/tiny", "-o", tmp_path / "one", "--by-shard", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "home").exists() or not list((tmp_path / "home").rglob("*.safetensors"))
    assert sum(v for k, v in hub.sent.items() if k.endswith(".bin")) == 0
    assert run("convert", "org/tiny", "-o", tmp_path / "two", env=env).returncode == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert left(tmp_path) == []
    offline = env | {"HF_HUB_OFFLINE": "1"}
    done = run("convert", "org/tiny", "-o", tmp_path / "three", "--by-shard", env=offline)
    assert done.returncode == 2 and "leave out --by-shard" in done.stderr
    assert run("unfold", tmp_path / "one", "-o", tmp_path / "again").returncode == 0
    assert (tmp_path / "again/model-00001-of-00004.safetensors").read_bytes() == (
        source / "model-00001-of-00004.safetensors"
    ).read_bytes()


# Reports the most that the folder of what arrives held while the bar moved.
WATCHED = """
import os, sys
from pathlib import Path
from gemma_fold import cli
from gemma_fold.commands import render
work, most = Path(sys.argv.pop(1)), 0
class Watching(render.ProgressBar):
    def advance(self, n_bytes):
        global most
        files = [p for p in work.rglob("*") if p.is_file()]
        most = max(most, sum(p.stat().st_blocks * 512 for p in files))
render.ProgressBar = Watching
try:
    cli.main()
finally:
    print(most, file=sys.stderr)
"""


def test_one_shard_at_a_time_is_on_the_disk(hub: HubServer, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = tmp_path / ".out.source.gemma-fold"
    arguments = (work, "convert", "org/tiny", "-o", out, "--by-shard")
    env = environment(hub, tmp_path)
    done = run(*arguments, command=("-c", WATCHED), env=env)
    assert done.returncode == 0, done.stderr
    sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
    assert max(sizes) <= int(done.stderr) < max(sizes) + (1 << 20) < sum(sizes)


@pytest.mark.slow
def test_a_connection_that_breaks_is_tried_again(hub: HubServer, tmp_path: Path) -> None:
    broken = []

    def breaks() -> bool:
        broken.append(len(broken) < 3)
        return broken[-1]

    hub.faults.breaks_large = breaks
    env = environment(hub, tmp_path)
    done = run("convert", "org/tiny", "-o", tmp_path / "out", "--by-shard", env=env)
    assert (done.returncode, done.stderr) == (0, "") and sum(broken) == 3
    hub.faults.breaks_large = None
    run("convert", "org/tiny", "-o", tmp_path / "two", env=env)
    assert tree(tmp_path / "out") == tree(tmp_path / "two")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(hub: HubServer, tmp_path: Path) -> None:
    """Ctrl-C in the middle of the second shard: what had come is not sent again."""
    env = environment(hub, tmp_path)
    out = tmp_path / "out"
    process: list[subprocess.Popen[str]] = []

    def interrupt() -> bool:
        if hub.sent["org/tiny/model-00001-of-00004.safetensors"] > PAYLOAD:
            process[0].send_signal(signal.SIGINT)
        return False

    hub.faults.breaks_large = interrupt
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from gemma_fold import cli\n"
        "cli.main()\n"
    )
    arguments = ["convert", "org/tiny", "-o", str(out), "--by-shard"]
    process.append(
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments], env=env, stderr=subprocess.PIPE, text=True
        )
    )
    stderr = process[0].communicate(timeout=patience.seconds(60))[1]
    assert process[0].returncode == 130, stderr
    assert "--resume" in stderr and not out.exists()
    hub.faults.breaks_large = None
    before = sum(hub.sent.values())
    assert run(*arguments, env=env).returncode == 2  # as ever, --resume is asked for
    asked_in_vain = sum(hub.sent.values()) - before
    done = run(*arguments, "--resume", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    first = hub.sent["org/tiny/model-00001-of-00004.safetensors"]
    assert first < 1.5 * PAYLOAD + 4 * asked_in_vain, "the first shard came once"
    assert run("verify", out).returncode == 0 and left(tmp_path) == []


def test_what_cannot_arrive_by_shard(hub: HubServer, source: Path, tmp_path: Path) -> None:
    env = environment(hub, tmp_path)
    done = run("convert", source, "-o", tmp_path / "out", "--by-shard")
    assert done.returncode == 2 and "is a folder; only a Hub id" in done.stderr
    stranger = tmp_path / ".out.source.gemma-fold"
    stranger.mkdir()
    (stranger / "mine").write_text("precious")
    done = run("convert", "org/tiny", "-o", tmp_path / "out", "--by-shard", env=env)
    assert done.returncode == 2 and "was not made by gemma-fold" in done.stderr
    assert (stranger / "mine").read_text() == "precious"
    done = run("convert", "org/absent", "-o", tmp_path / "new", "--by-shard", env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_dry_run_leaves_nothing(hub: HubServer, tmp_path: Path) -> None:
    env = environment(hub, tmp_path)
    arguments = ("convert", "org/tiny", "-o", tmp_path / "out", "--by-shard", "--dry-run", "--json")
    done = run(*arguments, env=env)
    assert json.loads(done.stdout)["tensors"] == 19
    assert left(tmp_path) == [] and not (tmp_path / "out").exists()
    assert sum(hub.sent.values()) < PAYLOAD
