"""What is mounted, open or named strangely around OUT loses nothing either."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import patience
import pytest
from checkpoints import tree, write_checkpoint
from commands import run
from test_safety import interrupted

from gemma_fold.checkpoint import staging
from gemma_fold.checkpoint.digest import digest_text
from gemma_fold.checkpoint.folder import Folder, open_folder
from gemma_fold.checkpoint.journal import Journal
from gemma_fold.checkpoint.staging import settle, work_folder
from gemma_fold.commands.convert import convert
from gemma_fold.commands.verify import verify
from gemma_fold.errors import HostError


@contextmanager
def bound(what: Path, where: Path) -> Iterator[None]:
    """`what` seen at `where`, too, on the same device as the folder above."""
    where.mkdir(exist_ok=True)
    command = ["mount", "--bind", str(what), str(where)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("bind mounts need root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(where)], check=True)


# --- mounts ---------------------------------------------------------------------------------------


def test_force_empties_no_folder_that_is_mounted_in_out(tmp_path: Path) -> None:
    source, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    convert(source, out)
    (out / "2_Dense").rename(tmp_path / "elsewhere")
    with bound(tmp_path / "elsewhere", out / "2_Dense"):
        before = tree(tmp_path)
        result = run("convert", source, "-o", out, "--force")
        assert result.returncode == 2 and "mount point" in result.stderr
        assert tree(tmp_path) == before


def test_folder_mounted_meanwhile_is_not_emptied(tmp_path: Path) -> None:
    outer, elsewhere = tmp_path / "outer", tmp_path / "elsewhere"
    (outer / "out" / "inner").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    with bound(elsewhere, outer / "out" / "inner"), open_folder(outer) as opened:
        assert not opened.remove_owned("out", lambda name, status: True)
    assert tree(elsewhere).keys() == {"mine"}


def test_mount_point_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    with bound(tmp_path / "elsewhere", out):
        result = run("convert", source, "-o", out)
        assert result.returncode == 2 and "mount point" in result.stderr
        assert not work_folder(out).exists()


# --- manifests made by hand, with the digest of their own text ------------------------------------


def forge(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = out / "gemma_fold.json"
    manifest = json.loads(path.read_text())
    del manifest["blake3"]
    change(manifest)
    body = json.dumps(manifest, indent=1)[:-2]
    path.write_text(body + f',\n  "blake3": "{digest_text(body.encode())}"\n}}\n')


def claim_with_a_text_digest(out: Path) -> None:
    (out / "notes.txt").write_text("only copy")

    def claim(manifest: dict[str, Any]) -> None:
        manifest["files"]["notes.txt"] = {"size": 9}
        manifest["written"]["notes.txt"] = "0" * 64

    forge(out, claim)


def edit_the_config_and_forget_its_digest(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "note": "only copy"}))
    forge(out, lambda manifest: manifest["written"].pop("config.json"))


FORGERIES: Mapping[str, Callable[[Path], None]] = {
    "a file among the texts": claim_with_a_text_digest,
    "a config without a digest": edit_the_config_and_forget_its_digest,
}


@pytest.mark.parametrize("case", FORGERIES)
def test_force_believes_no_manifest_without_a_digest_for_every_file(
    case: str, tmp_path: Path
) -> None:
    source, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    convert(source, out)
    FORGERIES[case](out)
    before = tree(out)
    result = run("convert", source, "-o", out, "--force")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert tree(out) == before


# --- closed standard streams ----------------------------------------------------------------------


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(closed: str, tmp_path: Path) -> None:
    """A file that were opened as descriptor 1 or 2 would get whatever a library prints."""
    source, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    command = f'exec "$0" -m gemma_fold convert "$1" -o "$2" {closed}'
    result = subprocess.run(
        ["bash", "-c", command, sys.executable, source, out],
        capture_output=True,
        text=True,
        check=False,
        timeout=patience.seconds(120),
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert verify(out, against=source).ok
    again = ["bash", "-c", command, sys.executable, source, out]
    assert (
        subprocess.run(
            again, capture_output=True, check=False, timeout=patience.seconds(120)
        ).returncode
        == 2
    )


def test_descriptors_of_closed_streams_are_taken(tmp_path: Path) -> None:
    script = (
        "import os, gemma_fold.cli as cli; cli.open_standard_streams(); "
        f"os.write(os.open({str(tmp_path / 'opened')!r}, os.O_CREAT | os.O_WRONLY), b'x'); "
        "[os.write(number, b'noise') for number in (1, 2)]"
    )
    command = ["bash", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, script]
    assert subprocess.run(command, check=False, timeout=patience.seconds(120)).returncode == 0
    assert (tmp_path / "opened").read_bytes() == b"x"


# --- work folders of other runs -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "new", "new/deeper", "mine"])
@pytest.mark.parametrize("options", [[], ["--force"], ["--restart"], ["--resume"]], ids=" ".join)
def test_out_in_a_work_folder_is_refused(options: list[str], name: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    work = interrupted(source, tmp_path / "other")
    before = tree(tmp_path)
    result = run("convert", source, "-o", work / name, *options)
    assert result.returncode == 2 and "work folder" in result.stderr
    assert tree(tmp_path) == before
    convert(source, tmp_path / "other", resume=True)
    assert verify(tmp_path / "other", against=source).ok


def test_journal_that_appears_meanwhile_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    mine = work_folder(out) / "journal"

    class Late(Journal):
        def __init__(self, work: Folder, kept: int) -> None:
            mine.write_text("only copy")
            super().__init__(work, kept)

    monkeypatch.setattr(staging, "Journal", Late)
    with pytest.raises(HostError, match="File exists"):
        convert(source, out)
    assert mine.read_text() == "only copy"
    settle(out)
    assert mine.read_text() == "only copy"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("planted", ["folder", "link"])
def test_result_swapped_before_the_last_rename_is_no_success(
    planted: str, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    if force:
        convert(source, out)
    replaced, original = tree(out), tree(source)
    name = "exchange" if force else "rename_new"
    real = getattr(staging, name)

    def swapped(work: Folder, new: str, *given: Any) -> Any:
        if new == "new":
            (work.path / "new").rename(tmp_path / "away")
            if planted == "folder":
                (work.path / "new").mkdir()
                (work.path / "new/mine").write_text("mine")
            else:
                (work.path / "new").symlink_to(source)
        return real(work, new, *given)

    with monkeypatch.context() as patch, pytest.raises(HostError, match="moved"):
        patch.setattr(staging, name, swapped)
        convert(source, out, force=force)
    settle(out)
    assert tree(source) == original
    assert verify(tmp_path / "away", against=source).ok
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    found = [tree(path) for path in folders if path != tmp_path / "away"]
    assert not force or replaced in found
    assert planted == "link" or any("mine" in names for names in found)
