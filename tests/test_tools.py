"""What the habits stand on: the list of targets, the lock files and the canary's table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import canary
import environments
import lock
import pytest
import release

ROOT = Path(__file__).resolve().parent.parent


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split())
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = dict(re.findall(r"^make (\S+) +(\S.*)$", done.stdout, re.MULTILINE))
    assert set(listed) == phony
    assert "canary" in listed and "lock" in listed


def test_every_lock_file_has_a_recipe() -> None:
    assert set(environments.LOCKS) == {path.name for path in ROOT.glob("constraints*.txt")}


def test_pins_leave_out_what_only_a_gpu_needs() -> None:
    frozen = "torch==2.13.0+cpu\nnvidia-nccl==2\nAbc==1\n-e git+somewhere#egg=here\n"
    assert lock.pins(frozen) == ["Abc==1", "torch==2.13.0"]


def test_hand_written_notes_stay_above_their_pins() -> None:
    old = ["# about the file", "", "a==1", "# b is old because c", "b==1", "gone==1"]
    new = ["a==2", "aa==1", "b==2"]
    assert lock.with_notes(old, new) == [
        *("# about the file", "", "a==2", "aa==1", "# b is old because c", "b==2")
    ]


@pytest.mark.slow  # a real environment is made
def test_a_failed_resolution_leaves_the_lock_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def recipe(python: environments.Python) -> None:
        python.run("-c", "raise SystemExit('no such release')")

    file = tmp_path / "constraints.txt"
    file.write_text("a==1\n")
    monkeypatch.setattr(lock, "ROOT", tmp_path)
    monkeypatch.setitem(environments.LOCKS, file.name, recipe)
    assert lock.main([file.name]) == 1
    assert file.read_text() == "a==1\n"
    assert "no such release" in capsys.readouterr().err


def test_sglangs_requirements_less_those_for_gpus() -> None:
    requirements = ["torch==2.14.1", "openai==2.6.1", "cuda-tile>=1", 'ray>=2; extra == "all"']
    needed = ["torch", "openai", "ray"]
    assert environments.narrowed(requirements, needed) == ["openai==2.6.1"]


@pytest.mark.parametrize(
    ("requirement", "name"),
    [("Abc_d>=1", "abc-d"), ("a[b]==1; python_version > '3'", "a"), ("a (>=1)", "a"), ("a", "a")],
)
def test_the_name_in_a_requirement(requirement: str, name: str) -> None:
    assert environments.name(requirement) == name


GOOD = canary.Found("vllm", "1.0", "read", 8, 8)


@pytest.mark.parametrize(
    ("found", "ok"),
    [
        (GOOD, True),
        (canary.Found("vllm"), False),  # nothing was counted
        (canary.Found("vllm", "1.0", "read", 7, 8), False),
        (canary.Found("vllm", "1.0", "other bits", 8, 8, equal=False), False),
        (canary.Found("vllm", "1.0", "read", 8, 8, passed=3, tests=4), False),
        (canary.Found("vllm", "1.0", "read", 8, 8, problem="not installed"), False),
    ],
)
def test_what_a_canary_lives_through(found: canary.Found, ok: bool) -> None:
    assert found.ok is ok
    assert ("FAILED" in canary.table([found])) is not ok


def test_a_canary_counts_what_pytest_wrote(tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\n"
        "def test_not_here(): pass\n"
        "def test_set_up(no_such_fixture): pass\n"
    )
    report = tmp_path / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", f"--junitxml={report}"]
    subprocess.run([sys.executable, "-m", "pytest", *options, str(tests)], capture_output=True)
    found = canary.with_tests(GOOD, report)
    assert (found.passed, found.tests) == (1, 3)
    assert found.problem == "test_bad: assert 1 == 2"


def test_a_release_is_what_its_tag_says() -> None:
    version = release.version()
    old = "## 0.0.1 (2020-01-01)\n\nold\n"
    assert release.notes(f"v{version}", f"## {version} (2026-12-01)\n\n* new\n\n{old}") == "* new"
    for tag, changelog, problem in (
        ("v0.0.1", f"## {version} (2026-12-01)\n", "is not v"),
        (f"v{version}", old, "begins with 0.0.1"),
        (f"v{version}", f"## {version} (unreleased)\n", "the day of the release"),
    ):
        with pytest.raises(ValueError, match=problem):
            release.notes(tag, changelog)


def test_the_changelog_begins_with_this_version() -> None:
    newest = release._HEADING.search((ROOT / "CHANGELOG.md").read_text())
    assert newest is not None and newest["version"] == release.version()
