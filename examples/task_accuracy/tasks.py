"""The tasks, and how an answer is graded."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("tasks.jsonl")


@dataclass(frozen=True)
class Task:
    """One question: `prompt` is what a model continues, `answer` the first line it should give."""

    id: str
    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Score:
    """How many of `tasks` were right."""

    right: int
    tasks: int

    @property
    def accuracy(self) -> float:
        return self.right / self.tasks

    @property
    def standard_error(self) -> float:
        """Of the accuracy, if tasks are drawn independently: the binomial one."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.tasks)


def read(limit: int | None = None) -> list[Task]:
    """The first `limit` tasks, which are of all kinds; all of them where it is None."""
    lines = FILE.read_text("utf-8").splitlines()
    return [Task(**json.loads(line)) for line in lines[:limit]]


def answer_of(continuation: str) -> str:
    """Its first line, without blanks at the ends."""
    return continuation.partition("\n")[0].strip()


def score(tasks: Sequence[Task], answers: Sequence[str]) -> dict[str, Score]:
    """By kind, and of all under the name "all"."""
    right = [task.answer == answer for task, answer in zip(tasks, answers, strict=True)]
    found = {"all": Score(sum(right), len(right))}
    for kind in sorted({task.kind for task in tasks}):
        of_kind = [ok for task, ok in zip(tasks, right, strict=True) if task.kind == kind]
        found[kind] = Score(sum(of_kind), len(of_kind))
    return found
