"""GEMMA_FOLD: which kernels the norms of an engine run, and the report of what was fused."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TextIO

from gemma_fold.errors import UnsupportedModelError, UsageError

VARIABLE = "GEMMA_FOLD"
#: require: native, and an error if something that could be fused is not.
VALUES = ("native", "stock", "require")

#: native: gemma-fold's operators on fp32 gamma. stock: the engine's own norms, with w = gamma - 1.
Mode = Literal["native", "stock"]

_log = logging.getLogger("gemma_fold")


def requested_mode() -> Mode | None:
    """The mode that GEMMA_FOLD asks for; None if it is unset or empty.

    Raises:
        UsageError: it has another value.
    """
    value = requested(VARIABLE, VALUES)
    return None if value is None else "stock" if value == "stock" else "native"


def requested(variable: str, choices: Iterable[str]) -> str | None:
    """The value of an environment variable, without blanks and in lower case; None if empty.

    Raises:
        UsageError: it is none of `choices`.
    """
    given = os.environ.get(variable, "")
    value = given.strip().lower()
    if not value:
        return None
    if value not in choices:
        *rest, last = map(repr, choices)
        raise UsageError(f"invalid {variable}={given!r}: expected {', '.join(rest)} or {last}")
    return value


def refuse_if_required(problem: object) -> None:
    """Called with what is not fused, and why.

    Raises:
        UnsupportedModelError: GEMMA_FOLD=require asks for all of it.
        UsageError: GEMMA_FOLD has an unknown value.
    """
    if requested(VARIABLE, VALUES) == "require":
        raise UnsupportedModelError(
            f"{VARIABLE}=require, but {problem}; upgrade gemma-fold, install a version of the "
            f"engine that it was tested with, or unset {VARIABLE}"
        )


@dataclass(frozen=True, slots=True)
class Missing:
    """A sandwich that is not fused.

    Attributes:
        where: the forward.
        norm: the norm that it begins with; empty if that is not known.
        reason: why it is not fused.
        layers: how many layers miss it.
    """

    where: str
    norm: str
    reason: str
    layers: int = 1

    def __str__(self) -> str:
        return f"{self.where}: {f'{self.norm}: ' if self.norm else ''}{self.reason}"


@dataclass(frozen=True, slots=True)
class Report:
    """What was fused in a model.

    Attributes:
        engine: its name and version.
        norms: how many norms are folded.
        fused: how many of the `sandwiches` are fused.
        missing: why the others are not.
    """

    engine: str
    norms: int
    fused: int
    sandwiches: int
    missing: tuple[Missing, ...] = ()

    @property
    def complete(self) -> bool:
        return self.fused == self.sandwiches

    def __str__(self) -> str:
        count = f"{self.norms} norm{'' if self.norms == 1 else 's'} folded"
        if self.sandwiches:
            count += f", {self.fused} of {self.sandwiches} sandwiches fused"
        reasons = "".join(f"; {missing}" for missing in self.missing)
        return f"{self.engine}: {count}{reasons}"


def announce(report: Report) -> None:
    """Log it, on stderr unless the program has configured logging.

    Raises:
        UnsupportedModelError: something is not fused, and GEMMA_FOLD=require asks for all.
        UsageError: GEMMA_FOLD has an unknown value.
    """
    if not report.complete:
        refuse_if_required(report)
    if not _log.hasHandlers():
        _log.addHandler(_Stderr())
    if _log.level == logging.NOTSET:
        _log.setLevel(logging.INFO)
    _log.log(logging.INFO if report.complete else logging.WARNING, "gemma-fold: %s", report)


if TYPE_CHECKING:
    _Handler = logging.StreamHandler[TextIO]
else:
    _Handler = logging.StreamHandler  # takes no argument before Python 3.11


class _Stderr(_Handler):
    """Writes to what sys.stderr is when something is written."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        raise AttributeError("it always is sys.stderr")
