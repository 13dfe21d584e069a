"""Commands and Python that the documents show fit the program."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import click
import pytest

import gemma_fold
from gemma_fold.cli import commands  # noqa: F401  (which adds them to the group)
from gemma_fold.cli.app import group

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
EACH = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

_FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
_FORMULA = re.compile(r"\w+ = ")
_OURS = ("gemma-fold ", "$ gemma-fold ", "hf ", "make ", "pip ", "python ", "vllm ")


def shown(document: Path, *languages: str) -> Iterator[str]:
    """What stands in fences of these languages."""
    for language, text in _FENCED.findall(document.read_text()):
        if language in languages:
            yield text


def command_lines(document: Path) -> Iterator[str]:
    """Every line for a shell; of fences that do not say what they hold, those of a program here."""
    for text in shown(document, "sh"):
        yield from text.splitlines()
    for text in shown(document, ""):
        yield from (line.strip() for line in text.splitlines() if line.strip().startswith(_OURS))
    for text in _INDENTED.findall(_FENCED.sub("", document.read_text())):
        lines = [line.strip() for line in text.splitlines()]
        if not _FORMULA.match(lines[0]):
            yield from lines


def calls(line: str) -> Iterator[list[str]]:
    """The programs that a line runs, each with its arguments."""
    inner = re.search(r"<\((.*?)\)", line)
    if inner:
        yield from calls(inner[1])
        return
    every_option = re.sub(r"\[(--[^]]*)\]", r"\1", line.removeprefix("$ "))
    words = shlex.split(every_option, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    one: list[str] = []
    for word in [*words, "&&"]:
        if word in ("&&", "|", ";"):
            if one:
                yield one[: one.index(">")] if ">" in one else one
            one = []
        else:
            one.append(word)


def ours(arguments: Sequence[str]) -> None:
    """The command line takes them; nothing is run."""
    assert arguments, "gemma-fold alone shows nothing"
    if arguments[0] in ("--version", "--help"):
        return
    context = click.Context(group, info_name="gemma-fold")
    name, command, rest = group.resolve_command(context, list(arguments))
    assert command is not None
    with command.make_context(name, rest, parent=context):
        pass


@cache
def targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def make(arguments: Sequence[str]) -> None:
    assert {word for word in arguments if "=" not in word} <= targets()


@cache
def extras() -> frozenset[str]:
    return frozenset(metadata("gemma-fold").get_all("Provides-Extra") or ())


def pip(arguments: Sequence[str]) -> None:
    for word in arguments[1:]:
        of = re.fullmatch(r"(?:gemma-fold|\.)\[(.*)\]", word)
        assert of is None or set(of[1].split(",")) <= extras(), f"no such extra: {word}"


def python(arguments: Sequence[str]) -> None:
    """A program of this repository, with options that it has; those of others are theirs."""
    module = arguments[0] == "-m"
    place = arguments[1].replace(".", "/") + ".py" if module else arguments[0]
    if module and arguments[1].partition(".")[0] not in ("benchmarks", "tests", "gemma_fold"):
        return
    source = (ROOT / place).read_text()
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        assert f'"{option}"' in source, f"{place} has no {option}"


def pytest_(arguments: Sequence[str]) -> None:
    assert all((ROOT / word).exists() for word in arguments if word.startswith("tests"))


def theirs(arguments: Sequence[str]) -> None:
    """Of another program, or of the reader's own."""


PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    "gemma-fold": ours,
    ".venv/bin/gemma-fold": ours,
    ".venv/bin/pytest": pytest_,
    "kernel-builder": theirs,
    "make": make,
    "pip": pip,
    "python": python,
    **dict.fromkeys(("vllm", "git", "./my-runtime"), theirs),
}


def fits(call: Sequence[str]) -> None:
    """Raises if the program does not take the call, or if nobody here knows the program."""
    if call[0] == "hf":
        call = call[1:] if call[1] == "gemma-fold" else ["git"]
    assert call[0] in PROGRAMS, f"what is {call[0]!r}?"
    PROGRAMS[call[0]](call[1:])


@EACH
def test_commands_fit_the_program(document: Path) -> None:
    for line in command_lines(document):
        for call in calls(line):
            try:
                fits(call)
            except (click.ClickException, AssertionError, OSError) as error:
                pytest.fail(f"{document.name}: {line}\n{error}")


@EACH
def test_commands_in_a_sentence_name_commands_and_options(document: Path) -> None:
    text = _FENCED.sub("", document.read_text())
    for words in re.findall(r"`gemma-fold ([a-z][^`]*)`", text):
        name, *rest = words.split()
        assert name in group.commands, f"{document.name}: gemma-fold {words}"
        params = group.commands[name].params
        options = {word for param in params for word in (*param.opts, *param.secondary_opts)}
        own = rest[: rest.index("--")] if "--" in rest else rest
        assert {word for word in own if word.startswith("-")} <= options, words


def test_what_does_not_fit_is_noticed() -> None:
    for line in (
        "gemma-fold convert a --onto b",
        "gemma-fold konvert a -o b",
        "gemma-fold verify",
        "make everything",
        "pip install 'gemma-fold[everything]'",
        "python -m benchmarks.norms --nowhere",
        "GEMMA_FOLD=native gemma-fold verify && gemma-fold inspect x",
        "curl x | gemma-fold inspect x",
    ):
        with pytest.raises((click.ClickException, AssertionError)):
            for call in calls(line):
                fits(call)


def uses(tree: ast.AST) -> Iterator[tuple[str, ast.Call | None]]:
    """Every dotted name of a piece of Python, with the call if it is called."""
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            yield ast.unparse(node), called.get(id(node))


def imported(tree: ast.AST) -> dict[str, Any]:
    """What of gemma-fold a piece of Python imports, by the name it has there."""
    names: dict[str, Any] = {"gemma_fold": gemma_fold}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gemma_fold"):
            home = import_module(node.module or "")
            names |= {alias.asname or alias.name: getattr(home, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("gemma_fold"):
                    import_module(alias.name)
    return names


def check_python(text: str) -> None:
    """Names of gemma-fold exist, and take the arguments that they are given."""
    tree = ast.parse(text)
    names = imported(tree)
    for dotted, call in uses(tree):
        first, *rest = dotted.split(".")
        if first not in names or not all(part.isidentifier() for part in rest):
            continue
        value = names[first]
        for part in rest:
            value = getattr(value, part)
        if call is not None and callable(value):
            keywords = {word.arg: None for word in call.keywords if word.arg}
            inspect.signature(value).bind(*call.args, **keywords)


@EACH
def test_python_fits_the_program(document: Path) -> None:
    for text in shown(document, "python"):
        if text.startswith("# gemma_fold/"):
            path, _, code = text.removeprefix("# ").partition("\n")
            assert code in (ROOT / path).read_text(), f"{path} has other code than {document.name}"
        else:
            check_python(text)


@pytest.mark.parametrize(
    "text",
    [
        "import gemma_fold\ngemma_fold.konvert('a', 'b')",
        "import gemma_fold\ngemma_fold.convert('a', 'b', onto='c')",
        "from gemma_fold import rules\nrules.lookup()",
        "from gemma_fold import ops\nops.rms_norm(x)",
    ],
)
def test_python_that_does_not_fit_is_noticed(text: str) -> None:
    with pytest.raises((AttributeError, TypeError)):
        check_python(text)
