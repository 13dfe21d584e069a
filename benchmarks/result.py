"""What every benchmark writes: one run of one program on one machine, as JSON.

A run is rows, and a row is what one implementation did in one case. A value is a median where its
name says no other; `_p10`, `_p90`, `_p99`, `_min`, `_max` and `_repeats` behind the name of another
value are its percentiles, its extremes and its repeats.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"
#: Where a row's `impl` names them: ours, an engine as it comes, a copy of the same bytes.
OURS, STOCK, COPY = "gemma_fold", "stock", "copy"
UNKNOWN = "unknown"

#: Strings, numbers, truths and None, and lists of them, by name.
Values: TypeAlias = dict[str, Any]


class ResultError(ValueError):
    """A file that is not such a result: which one, and why."""


@dataclass(frozen=True, slots=True)
class Machine:
    """`count` devices took part; `details` says what else the figures depend on."""

    device: str
    count: int
    details: Values = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settings:
    """What was not left at its default: for both sides, for the other one alone, for ours alone.

    `chosen` is what an engine said of itself when it was up, by side.
    """

    both: Values = field(default_factory=dict)
    stock: Values = field(default_factory=dict)
    ours: Values = field(default_factory=dict)
    chosen: Values = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """One run.

    Attributes:
        what: was measured, in a sentence.
        versions: of everything that takes part, by name.
        commit: of this repository, with `-dirty` where files differed from it; or `unknown`.
        date: of the run, or `unknown`.
        command: as it was typed.
        measures: what each value of the rows is, and in which unit.
        note: what a reader has to know beside it.
    """

    what: str
    machine: Machine
    versions: dict[str, str]
    commit: str
    date: str
    command: str
    settings: Settings
    measures: dict[str, str]
    rows: tuple[Row, ...]
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse what tables would get wrong.

        Raises:
            ResultError: what is wrong.
        """
        for problem in _problems(self):
            raise ResultError(problem)


@dataclass(frozen=True, slots=True)
class Row:
    """What `impl` did in one case."""

    case: Values
    impl: str
    values: Values


def _problems(result: Result) -> Iterable[str]:
    if not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?|unknown", result.commit):
        yield f"{result.commit!r} is no commit"
    if not re.fullmatch(r"\d{4}-\d\d-\d\d(T[\d:+]+)?|unknown", result.date):
        yield f"{result.date!r} is no date"
    if not result.rows:
        yield "it has no rows"
    seen = set()
    for row in result.rows:
        at = f"{row.impl} at {row.case}"
        if list(row.case) != list(result.rows[0].case):
            yield f"{at} is not a case like {result.rows[0].case}"
        if unknown := row.values.keys() - result.measures.keys():
            yield f"{at} has {sorted(unknown)}, of which `measures` says nothing"
        if bad := [name for name, value in row.values.items() if not _is_value(value)]:
            yield f"{at}: {bad[0]} is neither a number nor text, nor a list of them"
        if (at,) in seen:
            yield f"{at} is there twice"
        seen.add((at,))


def _is_value(value: object) -> bool:
    if isinstance(value, list):
        return not any(isinstance(one, list) for one in value) and all(map(_is_value, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)


def text(result: Result) -> str:
    """JSON, one line for each row."""
    head = {"schema": SCHEMA, **asdict(result)}
    rows = ",\n".join(json.dumps(row) for row in head.pop("rows"))
    if not head["note"]:
        del head["note"]
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def load(path: Path) -> Result:
    """The result in a file.

    Raises:
        ResultError: it is not one of this schema.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text())
        if found.pop("schema", None) != SCHEMA:
            raise ResultError(f"its schema is not {SCHEMA}")
        rows = tuple(_made(Row, row) for row in found.pop("rows"))
        machine, settings = (
            _made(kind, found.pop(name))
            for kind, name in ((Machine, "machine"), (Settings, "settings"))
        )
        return _made(Result, {**found, "machine": machine, "settings": settings, "rows": rows})
    except (ResultError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ResultError(f"{path.name} is no benchmark's result: {error}") from error


def _made(kind: Any, found: Mapping[str, Any]) -> Any:
    """A dataclass of the fields of the same names, each of the kind that it should be."""
    made = kind(**found)
    for one in fields(kind):
        container = one.type.partition("[")[0].partition(".")[0]
        wanted = {"str": str, "int": int, "dict": dict, "Values": dict}.get(container)
        if wanted is not None and not isinstance(getattr(made, one.name), wanted):
            raise ResultError(f"{one.name} of {kind.__name__} is no {wanted.__name__}")
    return made
