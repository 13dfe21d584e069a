"""Try the newest release of each engine, and say how much of gemma-fold holds with it.

    python tools/canary.py [--keep] [ENGINE ...]

Each engine gets an environment of its own, `.venvs/canary-ENGINE`, made anew; with --keep one that
is there is used as it is. In it the fused counts are taken (`tests/support/fused_counts.py`), and
the tests run that load tiny models, compare their outputs with the original's, and look for norms
without a row. Exit code 1 where an engine could not be installed, fuses less than is expected, or
fails a test.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import environments
from environments import ROOT, Python, Recipe, created, last_words

#: As in the Makefile: they do not load beside this torch and are not needed.
_VLLM_UNUSED = ("torchaudio", "torchcodec")


@dataclass(frozen=True, slots=True)
class Canary:
    """How an engine is tried.

    Attributes:
        recipe: what makes its environment.
        tests: what pytest is told: to load tiny models and compare, where the engine runs here, and
            to read its norms.
        setup: a script that completes the environment.
    """

    engine: str
    recipe: Recipe
    tests: tuple[str, ...]
    setup: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A row of the table.

    Attributes:
        fused, expected: sandwiches, in all families.
        equal: whether the outputs of every family that ran were the same bits before and after.
        passed, tests: how many tests, of how many that ran.
        problem: the first thing that went wrong, or empty.
    """

    engine: str
    version: str = "?"
    level: str = "-"
    fused: int = 0
    expected: int = 0
    equal: bool = True
    passed: int = 0
    tests: int = 0
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is missing; what was not counted at all is."""
        complete = self.fused == self.expected > 0 and self.equal
        return complete and self.passed == self.tests and not self.problem


TRANSFORMERS = Canary(
    "transformers",
    environments.transformers,
    (
        "tests/engines/test_transformers_families.py",
        "tests/rules/test_survey.py",
        "-k=says_what_the_original_says or folding_in_memory or reading_finds_the_classes",
        "-m=slow or not slow",
    ),
)
VLLM = Canary(
    "vllm",
    environments.vllm_cpu,
    (
        "tests/engines/test_vllm.py",
        "tests/rules/test_survey.py",
        "-k=stock_mode_gives or native_mode or has_no_file_without_a_row",
        "-m=engine",
    ),
    "tests/engines/vllm_setup.py",
)
VLLM_SOURCE = Canary(
    "vllm",
    environments.vllm_source,
    ("tests/rules/test_survey.py", "-k=has_no_file_without_a_row", "-m=engine"),
)
SGLANG = Canary(
    "sglang",
    environments.sglang,
    (
        "tests/engines/test_sglang.py",
        "tests/rules/test_survey.py",
        "-k=a_server_says or a_folded_model_is or native_folds or has_no_file_without_a_row",
        "-m=engine",
    ),
    "tests/engines/sglang_setup.py",
)
ENGINES = ("transformers", "vllm", "sglang")


def chosen(engine: str) -> Canary:
    """The canary of an engine; vLLM runs only where its newest release has a build for the CPU."""
    if engine == "vllm":
        return VLLM if newest("vllm-cpu") == newest("vllm") else VLLM_SOURCE
    return {"transformers": TRANSFORMERS, "sglang": SGLANG}[engine]


def newest(package: str) -> str:
    """Its newest release, as pip sees it from here; empty where there is none."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    done = subprocess.run(command, capture_output=True, text=True)
    # "name (1.2.3)" stands in the first line.
    return done.stdout.partition("(")[2].partition(")")[0]


def tried(canary: Canary, keep: bool) -> Found:
    """Make the environment, then count and test in it."""
    found = Found(canary.engine)
    try:
        python = environment(canary, keep)
        return checked(counted(canary.engine, python), canary, python)
    except subprocess.CalledProcessError as error:
        return replace(found, problem=last_words(error))


def environment(canary: Canary, keep: bool) -> Python:
    """The environment of an engine, new unless an old one is to be kept and is there."""
    folder = ROOT / ".venvs" / f"canary-{canary.engine}"
    python = Python(folder / "bin" / "python")
    if keep and python.path.exists():
        return python
    python = created(folder)
    canary.recipe(python)
    if canary.recipe is environments.vllm_cpu:
        python.run("-m", "pip", "uninstall", "-q", "-y", *_VLLM_UNUSED)
    if canary.setup:
        python.run(canary.setup)
    return python


def counted(engine: str, python: Python) -> Found:
    """The fused counts of one engine; those of others in its environment are left out."""
    printed = python.run("tests/support/fused_counts.py", "--print")
    rows = [row for row in json.loads(printed.splitlines()[-1]) if row["engine"] == engine]
    if not rows:
        return Found(engine, problem="no family of it was counted")
    levels = sorted({row["level"] for row in rows})
    return Found(
        engine,
        rows[0]["version"],
        ", ".join(levels),
        sum(row["fused"] for row in rows),
        sum(row["expected"] for row in rows),
        equal="other bits" not in levels,
        problem=next((f"{row['family']}: {row['why']}" for row in rows if row["why"]), ""),
    )


def checked(found: Found, canary: Canary, python: Python) -> Found:
    """`found` with what became of the tests that load and compare."""
    report = ROOT / ".venvs" / f"canary-{canary.engine}.xml"
    report.unlink(missing_ok=True)
    command = [str(python.path), "-m", "pytest", "-q", f"--junitxml={report}", *canary.tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    report.with_suffix(".log").write_text(done.stdout + done.stderr)
    if not report.exists():
        return replace(found, problem=(done.stderr or done.stdout).strip().rpartition("\n")[2])
    return with_tests(found, report)


def with_tests(found: Found, report: Path) -> Found:
    """`found` with the counts of a JUnit file; skipped tests did not run."""
    cases = list(xml.parse(report).iter("testcase"))
    ran = [case for case in cases if case.find("skipped") is None]
    failures = [
        (case.get("name"), (bad.get("message") or "").partition("\n")[0])
        for case in ran
        for bad in (*case.findall("failure"), *case.findall("error"))
    ]
    problem = found.problem or next((f"{name}: {message}" for name, message in failures), "")
    if not ran:
        problem = problem or "no test ran"
    failed = len({name for name, _ in failures})
    return replace(found, passed=len(ran) - failed, tests=len(ran), problem=problem)


def table(rows: Sequence[Found]) -> str:
    """For people: a line for each engine."""
    head = ("engine", "version", "level", "fused", "tests passed", "", "what went wrong first")
    cells = [
        (
            row.engine,
            row.version,
            row.level,
            f"{row.fused} of {row.expected}",
            f"{row.passed} of {row.tests}" if row.tests else "not run",
            "ok" if row.ok else "FAILED",
            row.problem[:160],
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *cells)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Try the newest release of each engine.")
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=", ".join(ENGINES))
    parser.add_argument("--keep", action="store_true", help="use an environment that is there")
    options = parser.parse_args(arguments)
    unknown = [engine for engine in options.engines if engine not in ENGINES]
    if unknown:
        parser.error(f"no engine {unknown[0]}; there are {', '.join(ENGINES)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = str(ROOT)
    rows = []
    for engine in options.engines or ENGINES:
        print(f"{engine}: installing and trying it", file=sys.stderr, flush=True)
        rows.append(tried(chosen(engine), options.keep))
    print(table(rows))
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
