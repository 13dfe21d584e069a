"""The command line on a terminal, in a pipe, in a script and in a hurry."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import patience
import pytest
from checkpoints import gemma3_tensors, write_checkpoint
from click.testing import CliRunner
from commands import run

from gemma_fold.cli import commands  # noqa: F401  (which fills the group)
from gemma_fold.cli.app import group

COMMANDS = sorted(group.commands)


def on_terminal(*arguments: str | Path, columns: int = 80, **environment: str) -> str:
    """What a terminal of so many columns is sent by a run of gemma-fold."""
    return shown_by("-m", "gemma_fold", *map(str, arguments), COLUMNS=str(columns), **environment)


def shown_by(*command: str, code: int = 0, **environment: str) -> str:
    """What a terminal is sent by Python with `command`, which exits with `code`."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=child,
        stdout=child,
        stderr=child,
        env=os.environ | {"TERM": "xterm"} | environment,
    )
    os.close(child)
    shown = b"".join(_read(parent))
    os.close(parent)
    assert process.wait(patience.seconds(120)) == code, shown
    return shown.decode()


def _read(descriptor: int) -> Iterator[bytes]:
    with suppress(OSError):  # which is how a terminal ends
        while data := os.read(descriptor, 4096):
            yield data


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_quiet_and_examples(name: str) -> None:
    shown = CliRunner().invoke(group, [name, "--help"]).output
    assert "--json" in shown and "--quiet" in shown
    assert f"Example{'s' * ('Examples' in shown)}:" in shown and f"gemma-fold {name}" in shown
    assert group.commands[name].short_help


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["inspekt"],
            "there is no command 'inspekt'; did you mean inspect? (see gemma-fold --help)",
        ),
        (["xyzzy"], "there is no command 'xyzzy' (see gemma-fold --help)"),
        (["inspect"], "missing argument 'SOURCE' (see gemma-fold inspect --help)"),
        (["convert", "x", "--forse", "-o", "y"], "did you mean '--force'"),
        (["verify", "x", "--agianst", "y"], "did you mean '--against'"),
        (["check", "x", "--expect", "beta"], "'beta' is not one of 'w', 'gamma'"),
    ],
)
def test_a_wrong_call_is_one_line_that_helps(arguments: list[str], line: str) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("gemma-fold: ") and result.stderr.count("\n") == 1
    assert line.lower() in result.stderr.lower()


def test_version_names_what_it_runs_with() -> None:
    first, second, third = run("--version").stdout.splitlines()[:3]
    assert re.fullmatch(r"gemma-fold \d+\.\d+\.\d+", first)
    assert second.startswith(f"Python {sys.version.split()[0]}")
    assert f"numpy {__import__('numpy').__version__}" in third


@pytest.mark.slow
def test_quiet_leaves_the_exit_code(model: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", gemma3_tensors(seed=1))
    out = tmp_path / "out"
    for code, *arguments in (
        (0, "inspect", model),
        (0, "convert", model, "-o", out),
        (0, "verify", out),
        (1, "verify", out, "--against", other),
        (0, "unfold", out, "-o", tmp_path / "again"),
        (1, "diff", model, other, "--no-outputs"),
    ):
        result = run(*arguments, "--quiet")
        assert (result.returncode, result.stdout, result.stderr) == (code, "", "")
    result = run("verify", tmp_path / "nothing", "-q")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert json.loads(run("verify", out, "-q", "--json").stdout)["ok"] is True


def test_warnings_are_not_among_the_results(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    (source / ".cache").mkdir()
    result = run("convert", source, "-o", tmp_path / "out")
    assert result.stdout.startswith("folded 19 norms")
    assert result.stderr == "warning: .cache/ is left out\n"


def test_colours_and_a_bar_on_a_terminal_only(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = on_terminal("convert", model, "-o", out)
    assert "folding  [" in shown and "100%" in shown
    assert "\x1b[32mok\x1b[0m: format" in on_terminal("verify", out)
    assert "\x1b[" not in on_terminal("verify", out, NO_COLOR="1").replace("\x1b[?25", "")
    assert "\x1b[" not in run("verify", out).stdout
    forced = run("verify", out, env=os.environ | {"CLICOLOR_FORCE": "1"})
    assert forced.stdout.startswith("\x1b[32mok\x1b[0m: ")
    assert "comparing" not in on_terminal("verify", out, "--quiet")


def test_a_bar_is_no_wider_than_the_terminal(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=3)
    shown = on_terminal("convert", source, "-o", tmp_path / "out", columns=60)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", shown)]
    bars = [line for line in lines if "folding" in line]
    assert len(bars) > 1 and max(map(len, bars)) <= 60


def test_a_table_that_is_too_wide_is_not_wrapped_by_the_terminal(model: Path) -> None:
    shown = on_terminal("inspect", model, columns=70, NO_COLOR="1")
    table = shown.split("\r\n\r\n")[1].splitlines()
    assert "model.layers.{i}.self_attn.q_norm.weight" in table and max(map(len, table)) <= 70
    assert "    count 3; shape [8]; dtype BF16; meaning zero-centred: RMSNorm gain" in table
    assert "TENSORS  " in on_terminal("inspect", model, columns=160)
    assert "TENSORS  " in run("inspect", model).stdout


def test_a_bar_ends_its_line_before_an_error(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from gemma_fold import cli; from gemma_fold.commands import convert\n"
        "def fail(*_): raise OSError(5, 'Input/output error', 'somewhere')\n"
        "convert._copy_others = fail\n"
        f"sys.argv = ['gemma-fold', 'convert', {str(model)!r}, '-o', {str(tmp_path / 'o')!r}]\n"
        "cli.main()\n"
    )
    last = shown_by("-c", code, code=2).rstrip().splitlines()[-1]
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).strip().startswith("gemma-fold: ")


@pytest.mark.slow
def test_what_takes_long_says_so_on_a_terminal(model: Path) -> None:
    code = (
        "import sys, time; from gemma_fold import cli; from gemma_fold.commands import inspect\n"
        "real = inspect.inspect\n"
        "inspect.inspect = lambda source: time.sleep(1.5) or real(source)\n"
        f"sys.argv = ['gemma-fold', 'inspect', {str(model)!r}]\n"
        "cli.main()\n"
    )
    shown = shown_by("-c", code)
    assert shown.startswith("\rreading headers (1 s)") and "\r\x1b[K" in shown


def test_an_unexpected_error_is_a_line_and_its_traceback_is_to_be_had(model: Path) -> None:
    code = (
        "import sys; from gemma_fold import cli; from gemma_fold.commands import inspect\n"
        "inspect.inspect = lambda source: {}['a key']\n"
        f"sys.argv = ['gemma-fold', 'inspect', {str(model)!r}]\n"
        "cli.main()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GEMMA_FOLD_TRACEBACK"}
    result = run(command=("-c", code), env=environment)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "unexpected KeyError: 'a key'; this is a bug" in result.stderr
    result = run(command=("-c", code), env=environment | {"GEMMA_FOLD_TRACEBACK": "1"})
    assert "Traceback" in result.stderr


def test_shells_complete(tmp_path: Path) -> None:
    command = tmp_path / "gemma-fold"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m gemma_fold "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = (
        "source <(gemma-fold completion bash)\n"
        "complete -p gemma-fold\n"
        "COMP_WORDS=(gemma-fold ver) COMP_CWORD=1 COMPREPLY=()\n"
        "_gemma_fold_completion gemma-fold\n"
        'echo "${COMPREPLY[@]}"\n'
        "COMP_WORDS=(gemma-fold verify --ag) COMP_CWORD=2 COMPREPLY=()\n"
        "_gemma_fold_completion gemma-fold\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["verify", "--against"], done.stderr
    for shell in ("zsh", "fish"):
        assert "_GEMMA_FOLD_COMPLETE" in run("completion", shell).stdout


def test_it_is_called_what_the_user_called_it() -> None:
    code = (
        "import sys; sys.argv = ['/x/bin/hf-gemma-fold', 'inspekt']\n"
        "from gemma_fold import cli; cli.main()"
    )
    assert "(see hf gemma-fold --help)" in run(command=("-c", code)).stderr
