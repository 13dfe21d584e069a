"""Nothing that is not ours is lost: sources, folders of a user, what a manifest points to."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import flipped, gemma3_tensors, tree, unchanged, write_checkpoint
from commands import run

from gemma_fold.checkpoint.folder import open_folder
from gemma_fold.checkpoint.progress import Progress
from gemma_fold.checkpoint.rename import exchange, rename_new
from gemma_fold.checkpoint.staging import work_folder
from gemma_fold.commands.convert import convert
from gemma_fold.commands.unfold import unfold
from gemma_fold.commands.verify import verify
from gemma_fold.errors import CheckpointError, HostError, UsageError

OPTIONS = [[], ["--resume"], ["--restart"], ["--force"], ["--force", "--resume"]]


class AtFile(Progress):
    """Calls `action` once, when file `number` begins."""

    def __init__(self, number: int, action: Callable[[], object]) -> None:
        self._number, self._action = number, action

    def file(self, name: str, number: int) -> None:
        if number == self._number:
            self._action()


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted(source: Path, out: Path) -> Path:
    """An interrupted conversion's work folder."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=AtFile(2, interrupt))
    return work_folder(out)


def written(tmp_path: Path, shards: int = 1) -> tuple[Path, Path]:
    """A source, and a conversion of it that is complete."""
    source, out = write_checkpoint(tmp_path / "model", shards=shards), tmp_path / "out"
    convert(source, out)
    return source, out


# --- the work folder: only what proves itself ours is touched ------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("name", ["out.partial", ".out.gemma-fold", ".out.gemma-fold/new"])
def test_source_with_a_name_of_ours(name: str, options: list[str], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / name)
    before = tree(source)
    result = run("convert", source, "-o", tmp_path / "out", *options)
    assert tree(source) == before
    assert "Traceback" not in result.stderr and "--force" not in result.stderr
    assert result.returncode == (0 if name == "out.partial" else 2)


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_folder_of_a_user_with_our_name(options: list[str], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    mine = tmp_path / ".out.gemma-fold"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (mine / "journal").write_text("dear diary\n")
    before = tree(tmp_path)
    result = run("convert", source, "-o", tmp_path / "out", *options)
    assert result.returncode == 2 and "not made by gemma-fold" in result.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("target", ["model", "other"])
def test_link_with_our_name(target: str, options: list[str], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("years of work")
    (tmp_path / ".out.gemma-fold").symlink_to(target)
    before = tree(tmp_path)
    result = run("convert", source, "-o", tmp_path / "out", *options)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert tree(tmp_path) == before


def test_link_inside_the_work_folder_is_not_followed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    work = interrupted(source, tmp_path / "out")
    before = tree(source)
    (work / "new/2_Dense").rmdir()
    (work / "new/2_Dense").symlink_to(source)
    convert(source, tmp_path / "out", restart=True)
    assert tree(source) == before and verify(tmp_path / "out", against=source).ok


def test_link_planted_where_a_folder_is_to_be_made(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    work = interrupted(source, tmp_path / "out")
    (work / "new/2_Dense").rmdir()
    (work / "new/2_Dense").symlink_to(elsewhere)
    with pytest.raises(HostError, match="cannot write"):
        convert(source, tmp_path / "out", resume=True)
    assert not any(elsewhere.iterdir())


def test_leftover_message_advises_nothing_that_loses_data(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    interrupted(source, tmp_path / "out")
    result = run("convert", source, "-o", tmp_path / "out")
    assert result.returncode == 2
    assert "--resume" in result.stderr and "--restart" in result.stderr
    assert "--force" not in result.stderr


# --- OUT: replaced only when asked, and only if it can be made again -----------------------------


@pytest.mark.parametrize("command", ["convert", "unfold"])
def test_output_that_appears_meanwhile_stays(command: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=2)
    out = tmp_path / "out"

    def appear() -> None:
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")

    convert(source, tmp_path / "folded")
    action = convert if command == "convert" else unfold
    given = source if command == "convert" else tmp_path / "folded"
    with pytest.raises(HostError, match="appeared while this run was writing"):
        action(given, out, progress=AtFile(2, appear))
    assert (out / "thesis.txt").read_text() == "years of work" and len(list(out.iterdir())) == 1
    out.rename(tmp_path / "moved")
    action(given, out, resume=True)
    assert tree(out) == tree(tmp_path / "folded" if command == "convert" else source)
    assert not work_folder(out).exists()


def test_force_keeps_what_is_not_part_of_the_checkpoint(tmp_path: Path) -> None:
    source, out = written(tmp_path)
    (out / "2_Dense/notes.txt").write_text("mine")
    refused = pytest.raises(UsageError, match=r"holds 2_Dense/notes\.txt, which is not part")
    with unchanged(out), refused:
        convert(source, out, force=True)


@pytest.mark.parametrize("atomic", [True, False])
def test_force_keeps_a_file_that_appears_meanwhile(
    atomic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not atomic:  # as file systems without RENAME_EXCHANGE and RENAME_NOREPLACE answer
        monkeypatch.setattr("gemma_fold.checkpoint.rename._renameat2", lambda *given: False)
    source, out = written(tmp_path, shards=2)

    def appear() -> None:
        (out / "notes.txt").write_text("mine")
        (out / "tokenizer.json").write_text("edited")

    report = convert(source, out, force=True, progress=AtFile(2, appear))
    assert verify(out, against=source).ok
    assert (tmp_path / "out.replaced/notes.txt").read_text() == "mine"
    assert (tmp_path / "out.replaced/tokenizer.json").read_text() == "edited"
    assert any("out.replaced" in warning for warning in report.warnings)
    assert not work_folder(out).exists()


def test_force_never_replaces_a_saved_model(tmp_path: Path) -> None:
    source, out = written(tmp_path)
    manifest = out / "gemma_fold.json"
    manifest.write_text(manifest.read_text().replace('"made_by": "convert"', '"made_by": "save"'))
    with unchanged(out), pytest.raises(UsageError, match="may be the only one of its kind"):
        convert(source, out, force=True)


def test_out_is_never_absent_while_it_is_replaced(tmp_path: Path) -> None:
    source, out = written(tmp_path)
    watch = (
        "import os, sys\n"
        "print('ready', flush=True)\n"
        "while os.path.exists(sys.argv[2]):\n"
        "    if not os.path.exists(sys.argv[1] + '/config.json'): print('absent')\n"
    )
    (tmp_path / "watching").touch()
    command = ["python3", "-c", watch, str(out), str(tmp_path / "watching")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None and watcher.stdout.readline() == "ready\n"
        for _ in range(5):
            convert(source, out, force=True)
        (tmp_path / "watching").unlink()
        assert watcher.stdout.read() == ""


# --- the source under other names -----------------------------------------------------------------


def link_farm(source: Path, blobs: Path) -> Path:
    """Move the files of `source` into `blobs` and leave links, as the Hub's cache has them."""
    for path in [p for p in source.rglob("*") if p.is_file()]:
        blob = blobs / path.relative_to(source).as_posix().replace("/", "--")
        path.rename(blob)
        path.symlink_to(blob)
    return source


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_source_whose_files_lie_in_out(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(write_checkpoint(tmp_path / "first"), out)
    source = write_checkpoint(tmp_path / "model")
    link_farm(source, out)
    before = tree(tmp_path)
    result = run("convert", source, "-o", out, *options)
    assert result.returncode == 2 and tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_force_over_an_out_that_holds_a_linked_source(kind: str, tmp_path: Path) -> None:
    """Nothing foreign in OUT by name: only device and inode tell."""
    out = tmp_path / "out"
    convert(write_checkpoint(tmp_path / "first"), out)
    source = write_checkpoint(tmp_path / "model")
    if kind == "file":
        (source / "tokenizer.json").unlink()
        (source / "tokenizer.json").symlink_to(out / "tokenizer.json")
    else:
        (source / "2_Dense/config.json").unlink()
        (source / "2_Dense").rmdir()
        (source / "2_Dense").symlink_to(out / "2_Dense")
    with unchanged(tmp_path), pytest.raises(UsageError, match="which is read"):
        convert(source, out, force=True)


def test_out_below_a_folder_that_the_source_links_to(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    (tmp_path / "linked").mkdir()
    (source / "more").symlink_to(tmp_path / "linked")
    with pytest.raises(UsageError, match="inside the source"):
        convert(source, tmp_path / "linked/out")
    assert not any((tmp_path / "linked").iterdir())


# --- names in a manifest --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/{root}/victim", "../victim", "a/../../victim", "", "x\0y"])
def test_unfold_writes_nothing_where_a_manifest_points(name: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=2)
    folded = tmp_path / "folded"
    convert(source, folded)
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    path = folded / "gemma_fold.json"
    manifest = json.loads(path.read_text())
    old, new = manifest["index_name"], name.replace("{root}", str(tmp_path))
    manifest["index_name"] = new
    manifest["files"][new] = manifest["files"].pop(old)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        unfold(folded, tmp_path / "back")
    assert victim.read_text() == "keep me"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folded", "model", "victim"]


def test_folder_creates_nothing_through_links(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/file").write_text("keep me")
    (tmp_path / "root/file").symlink_to(tmp_path / "elsewhere/file")
    with open_folder(tmp_path / "root") as folder:
        with pytest.raises(OSError):
            folder.create("link/new")
        os.close(folder.create("file"))
        for name in ("../x", "/x", "a//b", "", "."):
            with pytest.raises(CheckpointError):
                folder.create(name)
    assert (tmp_path / "elsewhere/file").read_text() == "keep me"
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["file"]


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("kind", ["full folder", "file", "link", "dangling link"])
def test_rename_replaces_nothing(
    kind: str, atomic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not atomic:
        monkeypatch.setattr("gemma_fold.checkpoint.rename._renameat2", lambda *given: False)
    (tmp_path / "new").mkdir()
    target = tmp_path / "target"
    if kind == "full folder":
        target.mkdir()
        (target / "x").touch()
    elif kind == "file":
        target.touch()
    else:
        target.symlink_to(tmp_path if kind == "link" else "nowhere")
    with open_folder(tmp_path) as folder, pytest.raises(FileExistsError):
        rename_new(folder, "new", folder, "target")
    assert (tmp_path / "new").is_dir() and os.path.lexists(target)


def test_exchange_is_in_use_here(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    with open_folder(tmp_path) as folder:
        assert exchange(folder, "a", folder, "b")
    assert (tmp_path / "a/b").exists() and (tmp_path / "b/a").exists()


# --- killed while publishing ----------------------------------------------------------------------


def test_killed_before_the_last_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "model", shards=2)
    convert(source, tmp_path / "expected")
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gemma_fold.checkpoint.staging.rename_new", lambda *given: interrupt())
        convert(source, out)
    assert not out.exists()
    convert(source, out, resume=True)
    assert tree(out) == tree(tmp_path / "expected") and not work_folder(out).exists()


@pytest.mark.parametrize("options", [{"resume": True}, {"restart": True}, {"force": True}])
def test_killed_between_the_two_renames(
    options: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without RENAME_EXCHANGE there is a moment when OUT is absent: the next run ends it."""
    source, out = written(tmp_path, shards=2)
    expected = tree(out)
    renames = []

    def one_rename(*given: object) -> None:
        renames.append(given)
        if len(renames) > 1:
            interrupt()
        rename_new(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("gemma_fold.checkpoint.staging.exchange", lambda *given: False)
        patch.setattr("gemma_fold.checkpoint.staging.rename_new", one_rename)
        convert(source, out, force=True)
    assert not out.exists() and tree(work_folder(out) / "old") == expected
    if "restart" in options:
        with pytest.raises(UsageError, match="not empty"):
            convert(source, out, **options)
    else:
        convert(source, out, **options)
    assert tree(out) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_failing_disk_between_the_two_renames_puts_out_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = written(tmp_path, shards=2)
    expected, renames = tree(out), []

    def second_fails(*given: object) -> None:
        renames.append(given)
        if len(renames) == 2:
            raise OSError(5, "Input/output error")
        rename_new(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(HostError, match="--resume"):
        patch.setattr("gemma_fold.checkpoint.staging.exchange", lambda *given: False)
        patch.setattr("gemma_fold.checkpoint.staging.rename_new", second_fails)
        convert(source, out, force=True)
    assert tree(out) == expected
    convert(source, out, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_resume_asks_for_the_space_that_is_left(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        tensors = gemma3_tensors() | {"model.large": np.zeros(1 << 20, np.float16)}
        source = write_checkpoint(tmp_path / "model", tensors)
        with pytest.raises(KeyboardInterrupt):
            convert(source, disk / "out", progress=AtFile(3, interrupt))
        convert(source, disk / "out", resume=True)
        assert verify(disk / "out", against=source).ok
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- the digests: verify alone proves a checkpoint, unfold proves its result ----------------------


def edit_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return edit


def pad_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b" " * 64
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


TAMPERINGS: dict[str, Callable[[Path], None]] = {
    "tensor": flipped("model.safetensors"),
    "tokenizer": flipped("tokenizer.json"),
    "chat template": edit_text("chat_template.jinja", "messages", "massages"),
    "file in a subfolder": edit_text("2_Dense/config.json", "{}", "[]"),
    "config": edit_text("config.json", '"dtype": "bfloat16"', '"dtype": "float16"'),
    "auto_map": edit_text("config.json", '"model_type"', '"auto_map": {}, "model_type"'),
    "header": pad_header,
    "manifest's version": edit_text("gemma_fold.json", '"version": "', '"version": "9'),
    "manifest's source": edit_text("gemma_fold.json", '"name": "model"', '"name": "other"'),
    "manifest's config": edit_text("gemma_fold.json", "rms_norm_eps", "rms_norm_epz"),
    "manifest's space": edit_text("gemma_fold.json", "{\n", "{ \n"),
}


@pytest.mark.parametrize("case", TAMPERINGS)
def test_tampering_is_seen_without_the_source(case: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    folded = tmp_path / "folded"
    convert(source, folded)
    assert verify(folded).ok
    TAMPERINGS[case](folded)
    assert not verify(folded).ok
    result = run("unfold", folded, "-o", tmp_path / "back")
    if result.returncode == 0:  # what was changed is not part of the source
        assert tree(tmp_path / "back") == tree(source)
    else:
        assert result.returncode == 2 and not (tmp_path / "back").exists()
        assert not work_folder(tmp_path / "back").exists()


def test_without_digests_both_say_what_they_cannot_prove(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    convert(source, tmp_path / "folded", digest=False)
    TAMPERINGS["tokenizer"](tmp_path / "folded")
    report = verify(tmp_path / "folded")
    assert report.ok and any("without digests" in note for note in report.notes)
    assert not verify(tmp_path / "folded", against=source).ok
    unfolded = unfold(tmp_path / "folded", tmp_path / "back")
    assert any("without digests" in warning for warning in unfolded.warnings)


@pytest.mark.parametrize("command", ["convert", "unfold"])
def test_resuming_a_finished_run_says_so(command: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=2)
    convert(source, tmp_path / "folded")
    action, given = (convert, source) if command == "convert" else (unfold, tmp_path / "folded")
    out = tmp_path / "out"
    action(given, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    action(given, out, resume=True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (out / "tokenizer.json").write_bytes(bytes((out / "tokenizer.json").stat().st_size))
    if command == "unfold":
        with pytest.raises(UsageError, match="not empty"):
            action(given, out, resume=True)


# --- holes ----------------------------------------------------------------------------------------


def test_holes_stay_holes(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    large = source / "large.bin"
    with large.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"in the middle")
    convert(source, tmp_path / "out")
    status = (tmp_path / "out/large.bin").stat()
    assert status.st_size == 64 << 20 and status.st_blocks * 512 < 1 << 20
    assert tree(tmp_path / "out")["large.bin"] == tree(source)["large.bin"]
