"""What a hostile user, a copied work folder or a badly timed process may do loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from checkpoints import flipped, tree, unchanged, write_checkpoint
from commands import run, run_here
from test_safety import AtFile, interrupt, interrupted, written

from gemma_fold.checkpoint import staging
from gemma_fold.checkpoint.folder import Folder
from gemma_fold.checkpoint.progress import Progress
from gemma_fold.checkpoint.staging import settle, work_folder
from gemma_fold.commands.convert import convert
from gemma_fold.commands.unfold import unfold
from gemma_fold.commands.verify import verify
from gemma_fold.errors import CheckpointError, HostError, UsageError

MARKER = '{"marker": "gemma-fold work folder", "plan": "x"}\n'


def one_line(result: subprocess.CompletedProcess[str]) -> bool:
    return result.stderr.count("\n") == 1 and result.stderr.startswith("gemma-fold: ")


def killed_before_the_exchange(source: Path, out: Path, *, force: bool) -> Path:
    """The work folder of a run that was stopped when everything but the last step was done."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(staging, "exchange", lambda *given: interrupt())
        patch.setattr(staging, "rename_new", lambda *given: interrupt())
        convert(source, out, force=force)
    return work_folder(out)


def killed_after_the_exchange(source: Path, out: Path, progress: Progress) -> None:
    """A --force that was stopped when OUT is new, and the replaced folder is still there."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Folder, "remove_owned", lambda *given: interrupt())
        convert(source, out, force=True, progress=progress)


# --- copied work folders --------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["resume", "restart", "force"])
def test_copy_of_a_finished_work_folder_is_no_finished_run(option: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=2)
    out = tmp_path / "out"
    work = killed_before_the_exchange(source, out, force=False)
    shutil.copytree(work, tmp_path / "copy")
    shutil.rmtree(work)
    (tmp_path / "copy").rename(work)
    convert(source, out, **{option: True})
    assert verify(out, against=source).ok
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_copy_of_links_shares_no_journal(tmp_path: Path) -> None:
    """`cp -al`: what the copy finishes must not count as finished by the original."""
    source = write_checkpoint(tmp_path / "model", shards=3)
    convert(source, tmp_path / "expected")
    work = interrupted(source, tmp_path / "out")
    shutil.copytree(work, work_folder(tmp_path / "other"), copy_function=os.link)
    half = "model-00003-of-00003.safetensors"
    (work / "new" / half).write_bytes(bytes((tmp_path / "expected" / half).stat().st_size))
    for _ in range(2):
        for name in ("other", "out"):
            with pytest.raises(UsageError, match="not made by gemma-fold"):
                convert(source, tmp_path / name, resume=True, progress=AtFile(5, interrupt))
    shutil.rmtree(work_folder(tmp_path / "other"))
    convert(source, tmp_path / "out", resume=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_finished_file_that_was_changed_is_written_again(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=3)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=AtFile(3, interrupt))
    done = work_folder(out) / "new/model-00001-of-00003.safetensors"
    raw = bytearray(done.read_bytes())
    raw[-1] ^= 1
    done.write_bytes(raw)
    convert(source, out, resume=True)
    assert verify(out, against=source).ok


# --- hostile journals -----------------------------------------------------------------------------

JOURNALS = {
    "deep": MARKER + "[" * 100_000 + "\n",
    "infinite inode": MARKER + '{"publish": 1e999, "replaced": null}\n',
    "digests that are none": MARKER + '{"done": "config.json", "size": 1, "digests": 7}\n',
    "state of four": MARKER + '{"publish": 1, "replaced": {"a": [1, 2, 3, 4, 5, 6]}}\n',
    "text for a state": MARKER + '{"publish": 1, "replaced": "abc"}\n',
    "list for an entry": MARKER + "[]\n7\nnull\n",
    "names elsewhere": MARKER + '{"publish": 1, "replaced": {"../model/config.json": [1, 2, 3]}}\n',
}


@pytest.mark.parametrize("option", ["--resume", "--restart", "--force"])
@pytest.mark.parametrize("case", JOURNALS)
def test_hostile_journal(case: str, option: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    before = tree(source)
    work = work_folder(tmp_path / "out")
    work.mkdir()
    (work / "journal").write_text(JOURNALS[case])
    result = run_here("convert", source, "-o", tmp_path / "out", option)
    assert tree(source) == before and "Traceback" not in result.stderr
    assert result.returncode == 0 or (result.returncode == 2 and one_line(result))


def test_journal_that_is_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    work = work_folder(tmp_path / "out")
    work.mkdir()
    os.mkfifo(work / "journal")
    for option in ("--resume", "--restart", "--force"):
        result = run("convert", source, "-o", tmp_path / "out", option)
        assert result.returncode == 2 and one_line(result)
        assert "not made by gemma-fold" in result.stderr


def test_journal_that_is_a_link(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    work = interrupted(source, tmp_path / "out")
    (work / "journal").rename(tmp_path / "precious")
    (work / "journal").symlink_to(tmp_path / "precious")
    before = tree(tmp_path)
    for option in ("--resume", "--restart", "--force"):
        result = run("convert", source, "-o", tmp_path / "out", option)
        assert result.returncode == 2 and "not made by gemma-fold" in result.stderr
    assert tree(tmp_path) == before


# --- a user's files inside the work folder --------------------------------------------------------


@pytest.mark.parametrize("option", ["--resume", "--restart", "--force"])
@pytest.mark.parametrize("name", ["thesis.txt", "new/thesis.txt", "new/2_Dense/thesis.txt"])
def test_file_of_a_user_inside_the_work_folder(name: str, option: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    work = interrupted(source, tmp_path / "out")
    (work / name).write_text("years of work")
    result = run("convert", source, "-o", tmp_path / "out", option)
    assert "Traceback" not in result.stderr
    assert [p.read_text() for p in tmp_path.rglob("thesis.txt")] == ["years of work"]
    assert result.returncode == 0 or one_line(result)


def test_file_of_a_user_inside_the_work_folder_of_a_run_that_fails(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=3)
    out = tmp_path / "out"

    def meddle() -> None:
        (work_folder(out) / "new/thesis.txt").write_text("years of work")
        os.truncate(source / "model-00003-of-00003.safetensors", 600)

    with pytest.raises(CheckpointError):
        convert(source, out, progress=AtFile(2, meddle))
    assert [p.read_text() for p in tmp_path.rglob("thesis.txt")] == ["years of work"]


# --- OUT that changes while it is replaced --------------------------------------------------------


def becomes_a_link(out: Path, aside: Path) -> None:
    aside.mkdir()
    (aside / "thesis.txt").write_text("years of work")
    out.rename(out.with_name("moved"))
    out.symlink_to(aside)


def becomes_a_file(out: Path, aside: Path) -> None:
    out.rename(out.with_name("moved"))
    out.write_text("years of work")


def becomes_another_folder(out: Path, aside: Path) -> None:
    out.rename(out.with_name("moved"))
    out.mkdir()
    (out / "config.json").write_text("years of work")


def vanishes(out: Path, aside: Path) -> None:
    out.rename(out.with_name("moved"))


def gets_a_deep_tree(out: Path, aside: Path) -> None:
    descriptor = os.open(out, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d" * 8, dir_fd=descriptor)
        inner = os.open("d" * 8, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    with open(os.open("thesis.txt", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor), "w") as file:
        file.write("years of work")
    os.close(descriptor)


CHANGES = [
    becomes_a_link,
    becomes_a_file,
    becomes_another_folder,
    vanishes,
]


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_out_that_changes_while_it_is_replaced(
    change: Callable[[Path, Path], None],
    atomic: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not atomic:
        monkeypatch.setattr("gemma_fold.checkpoint.rename._renameat2", lambda *given: False)
    source, out = written(tmp_path, shards=2)
    before = tree(out)
    meddle = AtFile(2, lambda: change(out, tmp_path / "aside"))
    try:
        convert(source, out, force=True, progress=meddle)
    except HostError as error:
        assert "\n" not in str(error)
    assert tree(tmp_path / "moved") == before
    if change is not vanishes:
        found = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size == 13]
        assert [p.read_text() for p in found if ".gemma-fold" not in str(p)]
    if not out.exists() or not verify(out, against=source).ok:
        convert(source, out, resume=True)
    assert verify(out, against=source).ok and not work_folder(out).exists()


def test_deep_tree_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    source, out = written(tmp_path, shards=2)
    meddle = AtFile(2, lambda: gets_a_deep_tree(out, out))
    try:
        report = convert(source, out, force=True, progress=meddle)
        assert verify(out, against=source).ok and not work_folder(out).exists()
        assert any("out.replaced" in warning for warning in report.warnings)
        count = ["find", str(tmp_path / "out.replaced"), "-name", "thesis.txt", "-printf", "x"]
        assert subprocess.run(count, capture_output=True, check=True).stdout == b"x"
    finally:  # too deep for pytest's own cleaning
        subprocess.run(["rm", "-rf", str(tmp_path / "out.replaced")], check=True)


def test_deep_tree_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    source, out = written(tmp_path)
    gets_a_deep_tree(out, out)
    try:
        result = run("convert", source, "-o", out, "--force")
        assert result.returncode == 2 and one_line(result) and "cannot list" in result.stderr
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    finally:
        subprocess.run(["rm", "-rf", str(out)], check=True)


def test_folder_that_another_run_replaced_is_not_started_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While --restart was planning, another run replaced OUT and was killed before cleaning up."""
    source, out = written(tmp_path, shards=2)
    real = staging.open_staging

    def after_the_other(*given: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gemma_fold.commands.convert.open_staging", real)
            killed_after_the_exchange(
                source, out, AtFile(2, lambda: (out / "notes.txt").write_text("mine"))
            )
        return real(*given, **options)

    monkeypatch.setattr("gemma_fold.commands.convert.open_staging", after_the_other)
    with pytest.raises(HostError, match="run once more"):
        convert(source, out, force=True)
    assert (work_folder(out) / "new/notes.txt").read_text() == "mine"
    settle(out)
    assert (tmp_path / "out.replaced/notes.txt").read_text() == "mine"


def test_what_is_kept_aside_is_told_by_the_run_that_settles(tmp_path: Path) -> None:
    source, out = written(tmp_path, shards=2)
    killed_after_the_exchange(
        source, out, AtFile(2, lambda: (out / "notes.txt").write_text("mine"))
    )
    report = convert(source, out, resume=True)
    assert (tmp_path / "out.replaced/notes.txt").read_text() == "mine"
    assert any("out.replaced" in warning for warning in report.warnings)


def test_a_long_name_is_kept_aside_too(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=2)
    out = tmp_path / ("o" * 255)
    convert(source, out)
    report = convert(
        source,
        out,
        force=True,
        progress=AtFile(2, lambda: (out / "notes.txt").write_text("mine")),
    )
    assert [p.read_text() for p in tmp_path.glob("*/notes.txt")] == ["mine"]
    assert any("kept in" in warning for warning in report.warnings)
    assert not work_folder(out).exists()


def test_nothing_is_removed_where_every_name_aside_is_taken(tmp_path: Path) -> None:
    source, out = written(tmp_path, shards=2)
    for number in range(1, 1001):
        (tmp_path / ("out.replaced" + (f"-{number}" if number > 1 else ""))).touch()
    convert(
        source,
        out,
        force=True,
        progress=AtFile(2, lambda: (out / "notes.txt").write_text("mine")),
    )
    assert [p.read_text() for p in tmp_path.rglob("notes.txt")] == ["mine"]


def test_an_edit_that_keeps_size_and_time_is_kept(tmp_path: Path) -> None:
    source, out = written(tmp_path, shards=2)

    def edit() -> None:
        path = out / "tokenizer.json"
        status = path.stat()
        with path.open("r+b") as file:
            file.write(b"mine")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    convert(source, out, force=True, progress=AtFile(2, edit))
    assert (tmp_path / "out.replaced/tokenizer.json").read_bytes()[:4] == b"mine"


def test_resume_sees_a_source_that_kept_size_and_time(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    interrupted(source, tmp_path / "out")
    path = source / "tokenizer.json"
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"changed")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UsageError, match="belongs to another source"):
        convert(source, tmp_path / "out", resume=True)


# --- --force replaces only what can be made again -------------------------------------------------


def claim_a_thesis(out: Path) -> None:
    """A manifest made by hand that calls a user's file a part of the checkpoint."""
    (out / "thesis.txt").write_text("years of work")
    path = out / "gemma_fold.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["thesis.txt"] = {"size": 13}
    del manifest["blake3"]
    path.write_text(json.dumps(manifest))


EDITS: dict[str, Callable[[Path], None]] = {
    "config": flipped("config.json", at=-2),
    "tokenizer": flipped("tokenizer.json", at=-2),
    "weights": flipped("model.safetensors", at=-2),
    "file in a subfolder": flipped("2_Dense/config.json", at=-2),
    "manifest": claim_a_thesis,
}


@pytest.mark.parametrize("case", EDITS)
def test_force_keeps_what_was_changed_since(case: str, tmp_path: Path) -> None:
    source, out = written(tmp_path)
    EDITS[case](out)
    before = tree(out)
    result = run("convert", source, "-o", out, "--force")
    assert result.returncode == 2 and one_line(result), result.stderr
    assert tree(out) == before


# --- what cannot be looked at or listed -----------------------------------------------------------


def test_work_folder_that_cannot_be_looked_at_is_an_error_and_not_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.lstat

    def lstat(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(".gemma-fold"):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, **options)

    monkeypatch.setattr(os, "lstat", lstat)
    with pytest.raises(HostError, match="cannot look at"):
        settle(tmp_path / "out")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOENT, errno.EACCES])
def test_what_cannot_be_listed_is_an_error_and_not_an_empty_folder(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = written(tmp_path)
    (out / "2_Dense/notes.txt").write_text("mine")
    before = tree(out)
    inode = (out / "2_Dense").stat().st_ino
    real_scandir, real_listdir = os.scandir, os.listdir

    def fail(path: object) -> None:
        if os.stat(path).st_ino == inode:  # type: ignore[arg-type]
            raise OSError(code, os.strerror(code), path)

    def scandir(path: object = ".") -> object:
        fail(path)
        return real_scandir(path)  # type: ignore[call-overload]

    def listdir(path: object = ".") -> object:
        fail(path)
        return real_listdir(path)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", scandir)
        patch.setattr("os.listdir", listdir)
        with pytest.raises((HostError, CheckpointError), match="cannot"):
            convert(source, out, force=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    assert tree(out) == before


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["convert", "unfold"])
def test_an_empty_name_is_not_the_current_folder(command: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    convert(source, tmp_path / "folded")
    (tmp_path / "here").mkdir()
    given = source if command == "convert" else tmp_path / "folded"
    result = run(command, given, "-o", "", cwd=tmp_path / "here", env=environment())
    assert result.returncode == 2 and one_line(result)
    assert not any((tmp_path / "here").iterdir())


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root}


NAMES = [
    "-o",
    "--force",
    ".hidden",
    "a\nb",
    "b" * 255,
    "é" * 127,
    "\udcff\udcfe",
    "a b'\"$(x)",
    "*",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name_of_out(name: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    out = tmp_path / name
    options = {"cwd": tmp_path, "env": environment()}
    for more in ([], ["--force"]):
        result = run("convert", source, f"--out={name}", *more, **options)
        assert result.returncode == 0, result.stderr
        assert len(list(tmp_path.iterdir())) == 2 and verify(out, against=source).ok
    result = run("unfold", out, "-o", "back", **options)
    assert result.returncode == 0 and tree(tmp_path / "back") == tree(source)


RELATIONS = {
    "in the source": "model/out",
    "the source": "model",
    "the source, with a slash": "model/",
    "above": ".",
    "above all": "/",
    "by dots": "model/2_Dense/..",
    "through a link": "link/out",
    "by a bind mount": "bound/out",
    "the folder above, bound": "bound-above",
    "a link to nothing": "dangling",
    "a loop": "loop",
    "below a file": "model/config.json/out",
    "a file": "file",
    "too long a name": "n" * 256,
}


@pytest.mark.parametrize("options", [[], ["--force"], ["--restart"], ["--resume"]], ids=" ".join)
@pytest.mark.parametrize("case", RELATIONS)
def test_out_that_would_endanger_something(
    case: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    above = tmp_path / "above"
    source = write_checkpoint(above / "model")
    (above / "link").symlink_to(source)
    (above / "dangling").symlink_to(above / "nowhere")
    (above / "loop").symlink_to("loop")
    (above / "file").write_text("mine")
    before = tree(above)
    mounts = {"bound": source, "bound-above": above}
    bound = [name for name in mounts if RELATIONS[case].startswith(name)][-1:]
    for name in bound:
        (above / name).mkdir()
        command = ["mount", "--bind", str(mounts[name]), str(above / name)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("bind mounts need root")
    try:
        monkeypatch.chdir(above)
        result = run_here("convert", source, "-o", RELATIONS[case], *options)
    finally:
        monkeypatch.undo()
        for name in bound:
            subprocess.run(["umount", str(above / name)], check=True)
    assert result.returncode == 2 and one_line(result), result.stderr
    assert tree(above) == before
    assert not list(above.rglob("*gemma-fold"))


# --- a model that is saved over another -----------------------------------------------------------

OLD = {"config.json": "old", "model-1.st": "old", "model-2.st": "old", "notes.txt": "mine"}
NEW = {"config.json": "new", "model-1.st": "new", "gemma_fold.json": "new", "sub/x.json": "new"}
MERGED = {**NEW, "notes.txt": "mine"}


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def texts(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def save_over(out: Path) -> tuple[str, ...]:
    """As `save_pretrained` does it: old model files go, others stay."""
    notes = settle(out).notes
    with staging.open_staging(out, "save", size=0, resume=False, restart=True) as work:
        write_files(work.folder.path, NEW)
        work.merge(lambda name: name.startswith("model"))
    return notes


MOVES = ("rename", "replace", "unlink", "mkdir", "fsync", "rmdir", "write")


def stopped_at(number: int, patch: pytest.MonkeyPatch, error: BaseException) -> list[str]:
    """Let the call `number` that changes something fail, and all after it as after a kill."""
    calls: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*given: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) > number:
                raise error
            return real(*given, **options)

        patch.setattr(os, name, call)

    for name in MOVES:
        wrap(name)
    return calls


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "I/O error")], ids=repr)
def test_save_that_is_stopped_anywhere_is_finished(error: BaseException, tmp_path: Path) -> None:
    outcomes = set()
    for number in range(200):
        out = tmp_path / f"out{number}"
        write_files(out, OLD)
        with pytest.MonkeyPatch.context() as patch:
            calls = stopped_at(number, patch, error)
            with suppress(KeyboardInterrupt, HostError):
                save_over(out)
        if len(calls) <= number:
            break
        found = texts(out)
        # Until the last file is in place there is nothing that a loader would take for a model.
        assert found in (OLD, MERGED) or "config.json" not in found
        settle(out)
        assert texts(out) in (OLD, MERGED)
        outcomes.add(texts(out)["config.json"])
        assert save_over(out) == () and texts(out) == MERGED
        assert not work_folder(out).exists()
    assert outcomes == {"old", "new"} and number > 15
    assert not list(tmp_path.glob("*.replaced*"))


def save_that_was_killed(out: Path) -> None:
    """Between the config's going and the first file's coming."""
    write_files(out, OLD)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *given, **options: interrupt())
        save_over(out)
    assert "config.json" not in texts(out)


@pytest.mark.parametrize("kind", ["another config", "another weight file", "folder", "link"])
def test_rest_of_a_save_replaces_nothing_that_came_since(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save_that_was_killed(out)
    if kind == "another config":
        (out / "config.json").write_text("mine")
    elif kind == "another weight file":
        (out / "model-1.st").write_text("mine")
    elif kind == "folder":
        (out / "gemma_fold.json").mkdir()
    else:
        (tmp_path / "elsewhere").mkdir()
        (out / "sub").symlink_to(tmp_path / "elsewhere")
    before = texts(out)
    notes = settle(out).notes
    assert texts(out) == before and len(notes) == 1 and "out.replaced" in notes[0]
    assert texts(tmp_path / "out.replaced") == NEW | {"old-config.json": "old"}
    assert not work_folder(out).exists() and not any((tmp_path / "elsewhere").glob("*"))


@pytest.mark.parametrize("command", ["convert", "unfold"])
def test_rest_of_a_save_is_kept_where_its_folder_is_gone(command: str, tmp_path: Path) -> None:
    source, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    convert(source, tmp_path / "folded")
    save_that_was_killed(out)
    shutil.rmtree(out)
    given = {"convert": source, "unfold": tmp_path / "folded"}[command]
    result = run(command, given, "-o", out)
    assert result.returncode == 0 and "out.replaced" in result.stderr
    assert texts(tmp_path / "out.replaced") == NEW | {"old-config.json": "old"}


def test_a_mount_that_cannot_be_saved_into_keeps_what_it_holds(tmp_path: Path) -> None:
    """A bind mount has the device of the folder beside it, but no file can move between them."""
    out, real = tmp_path / "o u\\t", tmp_path / "real"
    write_files(real, OLD)
    out.mkdir()
    command = ["mount", "--bind", str(real), str(out)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("bind mounts need root")
    try:
        with pytest.raises(HostError):
            save_over(out)
        assert texts(real) == OLD
        source = write_checkpoint(tmp_path / "model")
        result = run("convert", source, "-o", out, "--force")
        assert result.returncode == 2 and one_line(result) and "mount point" in result.stderr
    finally:
        subprocess.run(["umount", str(out)], check=True)
    assert texts(real) == OLD


# --- unfold ---------------------------------------------------------------------------------------


def test_unfold_onto_its_own_folder(tmp_path: Path) -> None:
    source, out = written(tmp_path)
    before = tree(out)
    (tmp_path / "link").symlink_to(out)
    for name in (out, tmp_path / "link", out / "2_Dense", out / "new"):
        for options in ([], ["--restart"], ["--resume"]):
            result = run_here("unfold", out, "-o", name, *options)
            assert result.returncode == 2 and one_line(result)
    assert tree(out) == before
    unfold(out, tmp_path / "back")
    assert tree(tmp_path / "back") == tree(source)


@pytest.mark.parametrize("name", ["model.safetensors", "2_Dense/config.json", "config.json"])
def test_resuming_what_has_lost_a_file_is_not_finished(name: str, tmp_path: Path) -> None:
    source, out = written(tmp_path)
    (out / name).unlink()
    with unchanged(out), pytest.raises(UsageError, match="not empty"):
        convert(source, out, resume=True)


@pytest.mark.parametrize("command", ["convert", "unfold"])
@pytest.mark.parametrize("kind", ["gone", "changed"])
def test_nothing_is_published_that_was_not_written(kind: str, command: str, tmp_path: Path) -> None:
    """As where a case-insensitive disk takes two names for one."""
    source, out = write_checkpoint(tmp_path / "model", shards=2), tmp_path / "out"
    convert(source, tmp_path / "folded")
    action, given = (convert, source) if command == "convert" else (unfold, tmp_path / "folded")

    def meddle() -> None:
        path = work_folder(out) / "new/model-00001-of-00002.safetensors"
        path.unlink()
        if kind == "changed":
            path.write_text("mine")

    with pytest.raises(HostError, match="not what was written"):
        action(given, out, progress=AtFile(3, meddle))
    assert not out.exists()
    action(given, out, resume=True)
    assert tree(out) == tree(tmp_path / "folded" if command == "convert" else source)
