"""The tasks of `examples/task_accuracy`: the committed bytes, right answers, and a real run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import patience
import pytest

from gemma_fold.commands.convert import convert

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "task_accuracy"
TASKS: list[dict[str, str]] = [
    json.loads(line) for line in (FOLDER / "tasks.jsonl").read_text("utf-8").splitlines()
]


def of(*kinds: str) -> list[dict[str, str]]:
    return [task for task in TASKS if task["kind"] in kinds]


def last_line(task: dict[str, str]) -> str:
    return task["prompt"].splitlines()[-1]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import tasks

    return tasks


def test_the_program_writes_the_committed_bytes(tmp_path: Path) -> None:
    program = "from pathlib import Path; import runpy, tasks; tasks.FILE = Path('tasks.jsonl')"
    run = f"{program}; runpy.run_path({str(FOLDER / 'make_tasks.py')!r}, run_name='__main__')"
    subprocess.run(
        [sys.executable, "-c", run], cwd=tmp_path, env={"PYTHONPATH": str(FOLDER)}, check=True
    )
    assert (tmp_path / "tasks.jsonl").read_bytes() == (FOLDER / "tasks.jsonl").read_bytes()


def test_every_task_is_another() -> None:
    assert len(TASKS) >= 500
    for key in ("id", "prompt"):
        assert len({task[key] for task in TASKS}) == len(TASKS)
    # No question is among its own examples, with its answer.
    assert not any(f"{last_line(task)} {task['answer']}\n" in task["prompt"] for task in TASKS)
    for task in TASKS:
        assert task["prompt"].count("\n") == 3 and not task["prompt"].endswith(" ")
        assert task["answer"] == task["answer"].strip() != ""


def test_arithmetic_is_right() -> None:
    asked = of("addition", "subtraction", "multiplication")
    assert len(asked) == 200
    for task in asked:
        for line in [*task["prompt"].splitlines()[:-1], f"{last_line(task)} {task['answer']}"]:
            a, sign, b, value = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", line).groups()  # type: ignore[union-attr]
            found = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            assert found == int(value)


def test_answers_that_the_question_holds() -> None:
    for task in of("copying"):
        assert last_line(task) == f"Copy: {task['answer']} ->"
    for task in of("last_word"):
        assert last_line(task).endswith(f" {task['answer']} is")
    for task in of("counting"):
        terms = [int(term) for term in re.findall(r"\d+", last_line(task))]
        assert int(task["answer"]) - terms[-1] == terms[-1] - terms[-2] == terms[1] - terms[0] > 0


def test_a_prefix_has_every_kind_in_proportion() -> None:
    counts = Counter(task["kind"] for task in TASKS)
    first = Counter(task["kind"] for task in TASKS[:100])
    for kind, count in counts.items():
        assert abs(first[kind] - 100 * count / len(TASKS)) <= 1


def test_grading(tasks: Any) -> None:
    assert tasks.answer_of(" Paris \nThe capital") == "Paris"
    assert tasks.answer_of("\nParis") == ""
    asked = tasks.read(40)
    answers = [task.answer for task in asked]
    answers[0] += "."  # exactly the answer, or wrong
    answers[1] = ""
    found = tasks.score(asked, answers)
    assert (found["all"].right, found["all"].tasks) == (38, 40)
    assert math.isclose(found["all"].standard_error ** 2, 0.95 * 0.05 / 40)
    assert sum(one.tasks for name, one in found.items() if name != "all") == 40


@pytest.mark.slow
def test_the_real_270m_and_its_folded_self_give_the_same_answers(
    real_270m: Path, tmp_path: Path
) -> None:
    convert(real_270m, tmp_path / "folded")
    results = []
    for model in (real_270m, tmp_path / "folded"):
        output = tmp_path / "result.json"
        options = ("--engine", "transformers", "--limit", "24", "--json", str(output))
        subprocess.run(
            [sys.executable, str(FOLDER / "run.py"), str(model), *options],
            check=True,
            timeout=patience.seconds(600),
        )
        results.append(json.loads(output.read_text("utf-8")))
    original, folded = results
    assert folded["answers"] == original["answers"] and folded["scores"] == original["scores"]
    assert 8 <= original["scores"]["all"]["right"] < 24
