"""What the package needs: nothing but its own requirements for files, and a word where more is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import environments
import patience
import pytest
from checkpoints import tree, write_checkpoint

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
ROOT = Path(__file__).resolve().parent.parent

#: Runs the command line where of all packages only those named first can be imported.
ONLY = """
import sys
from importlib.metadata import packages_distributions
kept, sys.argv = set(sys.argv[1].split(",")), ["gemma-fold", *sys.argv[2:]]
for module, packages in packages_distributions().items():
    if not kept & {package.lower().replace("_", "-") for package in packages}:
        sys.modules[module] = None
from gemma_fold.cli import main
main()
"""


def closure(package: str) -> set[str]:
    """A package and all that it requires, without extras."""
    found: set[str] = set()
    waiting = [package]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            asked = requires(name) or []
        except ModuleNotFoundError:  # for another Python or system
            continue
        waiting += [environments.name(one) for one in asked if "extra ==" not in one]
    return found


def core() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = [environments.name(one) for one in project["dependencies"]]
    return {"gemma-fold", *(name for one in packages for name in closure(one))}


def run(*arguments: str | Path, more: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    kept = ",".join([*core(), *(name for one in more for name in closure(one))])
    return subprocess.run(
        [sys.executable, "-c", ONLY, kept, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=patience.seconds(120),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.mark.slow
def test_files_need_nothing_but_the_core(tmp_path: Path) -> None:
    assert "torch" not in core() and "torch" in packages_distributions()
    source = write_checkpoint(tmp_path / "model", shards=2)
    folded, back = tmp_path / "folded", tmp_path / "back"
    for arguments in (
        ["inspect", source],
        ["convert", source, "-o", folded],
        ["verify", folded],
        ["verify", folded, "--against", source],
        ["unfold", folded, "-o", back],
        ["check", folded, "--against", source],
        ["diff", source, folded, "--no-outputs"],
        ["diff", source, folded],
    ):
        result = run(*arguments)
        assert (result.returncode, result.stderr) == (0, ""), (arguments, result.stderr)
    assert "outputs were not compared: that needs torch: pip install" in result.stdout
    assert tree(back) == tree(source)


@pytest.mark.parametrize(
    ("arguments", "more", "line"),
    [
        (["doctor"], (), "doctor needs torch: pip install 'gemma-fold[torch]'"),
        (
            ["diff", "model", "model", "--outputs"],
            (),
            "comparing outputs needs torch: pip install 'gemma-fold[transformers]'",
        ),
        (
            ["diff", "http://127.0.0.1:9", "http://127.0.0.1:9"],
            (),
            "comparing outputs needs torch: pip install 'gemma-fold[torch]'",
        ),
        (
            ["diff", "model", "model", "--outputs"],
            ("torch",),
            "comparing outputs needs transformers: pip install 'gemma-fold[transformers]'",
        ),
    ],
)
def test_what_needs_more_says_so_in_a_line(
    arguments: list[str], more: Sequence[str], line: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "model")
    given = [str(source) if argument == "model" else argument for argument in arguments]
    result = run(*given, more=more)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"gemma-fold: {line}\n"


@pytest.mark.slow
def test_the_library_says_so_too() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import gemma_fold\n"
        "for name in ('load', 'ops', 'fold_model'):\n"
        "    try: getattr(gemma_fold, name)\n"
        "    except gemma_fold.HostError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"gemma_fold.{name} needs torch: pip install 'gemma-fold[torch]'"
        for name in ("load", "ops", "fold_model")
    ]


@pytest.mark.slow  # environments are made
def test_wheel_and_sdist_install_into_new_environments() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "package.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("core needs no torch" in line for line in lines)
