"""`check` and `diff` of other tools' files on the command line: one comparison, every report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import ml_dtypes
import norm_files as files
import pytest
import tiny
import torch
from commands import run_here
from norm_files import QUANTIZERS, added, rounded

from gemma_fold import convert

AWQ = {"quantization_config": QUANTIZERS["awq"]}
GPTQ = {"quantization_config": QUANTIZERS["gptq"]}


def _gguf(original: Path, out: Path, change: files.Change = files.right) -> Path:
    out.mkdir()
    return files.write_gguf(original, out / "a.gguf", change)


def _gguf_folder(original: Path, out: Path) -> Path:
    return _gguf(original, out).parent


def _awq(original: Path, out: Path, change: files.Change = files.right) -> Path:
    return files.write_folder(original, out, change, config=AWQ)


Write = Callable[[Path, Path], Path]
FILES: dict[str, tuple[Write, int]] = {
    "gguf": (_gguf, 0),
    "folder of a gguf": (_gguf_folder, 0),
    "gguf, doubled": (lambda o, p: _gguf(o, p, added(1)), 1),
    "gguf, not folded": (lambda o, p: _gguf(o, p, added(-1)), 1),
    "mlx": (files.write_mlx, 0),
    "mlx, added": (lambda o, p: files.write_mlx(o, p, added(1)), 1),
    "awq": (_awq, 0),
    "awq, rounded": (lambda o, p: _awq(o, p, rounded(ml_dtypes.bfloat16)), 1),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    return tiny.save("gemma3_text", folder, torch.bfloat16)


class TestDiff:
    """Files of two tools have their norms in common: what `check` says of them, `diff` says."""

    @pytest.mark.parametrize("kind", FILES)
    def test_says_what_check_does(self, kind: str, original: Path, tmp_path: Path) -> None:
        write, code = FILES[kind]
        made = write(original, tmp_path / "made")
        for form in ((), ("--json",)):
            of_check = run_here("check", made, "--against", original, *form)
            of_diff = run_here("diff", original, made, *form)
            assert (of_diff.returncode, of_diff.stdout) == (code, of_check.stdout)
            assert of_diff.stderr == ""
        assert json.loads(of_diff.stdout)["right"] is (code == 0)

    def test_either_side_may_be_any_of_them(self, original: Path, tmp_path: Path) -> None:
        folded = tmp_path / "folded"
        convert(original, folded)
        right = {kind: FILES[kind][0](original, tmp_path / kind) for kind in ("gguf", "mlx", "awq")}
        for a in (original, folded, *right.values()):
            for b in right.values():
                found = run_here("diff", a, b, "--no-outputs")
                assert found.returncode == 0, (a, b, found.stdout, found.stderr)

    def test_of_two_quantized_folders_of_one_tool_everything_is_compared(
        self, original: Path, tmp_path: Path
    ) -> None:
        one, two = (_awq(original, tmp_path / name) for name in ("one", "two"))
        same = run_here("diff", one, two, "--no-outputs")
        assert same.returncode == 0 and "tensors identical" in same.stdout
        other = files.write_folder(original, tmp_path / "other", config=GPTQ)
        assert "tensors identical" not in run_here("diff", one, other, "--no-outputs").stdout

    def test_structure_and_outputs_of_a_quantized_folder_are_compared_when_asked_for(
        self, original: Path, tmp_path: Path
    ) -> None:
        found = run_here("diff", original, _awq(original, tmp_path / "made"), "--structure-only")
        assert found.returncode == 1 and "quantization_config" in found.stdout

    @pytest.mark.parametrize(
        "options",
        [("--outputs",), ("--structure-only",), ("--engine", "vllm"), ("--dtype", "float32")],
    )
    def test_of_a_gguf_file_they_cannot_be(
        self, options: tuple[str, ...], original: Path, tmp_path: Path
    ) -> None:
        found = run_here("diff", original, _gguf(original, tmp_path / "made"), *options)
        assert found.returncode == 2 and found.stdout == ""
        assert "of which only the norms are compared" in found.stderr
        assert found.stderr.count("\n") == 1

    @pytest.mark.parametrize("options", [("--max-ulp", "7"), ("--max-kl", "0.5")])
    def test_norms_are_compared_exactly(
        self, options: tuple[str, ...], original: Path, tmp_path: Path
    ) -> None:
        found = run_here("diff", original, _gguf(original, tmp_path / "made"), *options)
        assert found.returncode == 2
        assert "leave out --max-kl and --max-ulp" in found.stderr

    def test_markdown(self, original: Path, tmp_path: Path) -> None:
        made = _gguf(original, tmp_path / "made", added(1))
        found = run_here("diff", original, made, "--markdown")
        lines = found.stdout.splitlines()
        assert lines[0].startswith("**wrong: all 13 norms had the offset added twice")
        assert lines[2] == f"- file `{made}`: " + lines[2].partition("`: ")[2]
        assert "| offset added twice | 13 |" in found.stdout
        assert "... and 3 more; --all lists them" in found.stdout


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


class TestHtml:
    @pytest.mark.parametrize("command", ["check", "diff"])
    def test_one_file_that_fetches_nothing(
        self, command: str, original: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip("matplotlib")
        made = _gguf(original, tmp_path / "<b> & co", rounded(ml_dtypes.bfloat16))
        out = tmp_path / "report.html"
        sides = (made, "--against", original) if command == "check" else (original, made)
        assert run_here(command, *sides, "--html", out).returncode == 1
        page = Page(out)
        assert all(link.startswith("#") for link in page.links)
        assert not page.tags & {"script", "link", "img", "iframe"} and "svg" in page.tags
        assert "Rounded" in page.text and "all 13 norms have the offset right" in page.text
        assert str(made) in page.text  # as text, not as markup
        report = json.loads(run_here("check", made, "--against", original, "--json").stdout)
        for norm in report["norms"]:
            assert norm["name"] in page.text and f"{norm['max_ulp']:,}" in page.text

    def test_a_right_file_and_one_that_does_not_tell(self, original: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        made = _gguf(original, tmp_path / "made")
        out = tmp_path / "report.html"
        assert run_here("check", made, "--against", original, "--html", out).returncode == 0
        page = Page(out)
        assert "Right 13 norms hold gamma = offset + w, exactly" in page.text
        assert "Wrong norms" not in page.text and "svg" not in page.tags
        assert run_here("check", original, "--html", out).returncode == 2  # over the page before
        assert "Cannot tell" in Page(out).text and "--against" in Page(out).text

    def test_what_is_not_ours_stays(self, original: Path, tmp_path: Path) -> None:
        kept = tmp_path / "notes.txt"
        kept.write_text("mine")
        for place, words in (
            (kept, "not written by diff or check"),
            (tmp_path, "is a folder"),
            (tmp_path / "none" / "x.html", "make it first"),
        ):
            found = run_here("check", original, "--html", place)
            assert found.returncode == 2 and words in found.stderr
        assert kept.read_text() == "mine"

    def test_a_pipe_is_not_waited_for(self, original: Path, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        found = run_here("check", original, "--html", tmp_path / "pipe")
        assert found.returncode == 2 and "is no file" in found.stderr
