"""What was fused in a model, of how much, and why not the rest: said once, at load."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any, TextIO

from gemma_fold.engines.mode import VARIABLE, required
from gemma_fold.errors import UnsupportedModelError

_log = logging.getLogger("gemma_fold")


@dataclass(frozen=True, slots=True)
class Missing:
    """A sandwich that is not fused: where, after which norm, why, and in how many layers."""

    where: str
    norm: str
    reason: str
    layers: int = 1

    def __str__(self) -> str:
        return f"{self.where}: {f'{self.norm}: ' if self.norm else ''}{self.reason}"


@dataclass(frozen=True, slots=True)
class Report:
    """engine: its name and version. sandwiches: how many there are, of which `fused` are fused."""

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
    """Say it, on stderr unless the program set up logging its own way.

    Raises UnsupportedModelError where something is not fused and GEMMA_FOLD=require asks for all.
    """
    if not report.complete and required():
        raise UnsupportedModelError(
            f"{VARIABLE}=require, but {report}; upgrade gemma-fold, install a version of the "
            f"engine that it was tested with, or unset {VARIABLE}"
        )
    if not _log.hasHandlers():
        _log.addHandler(_Stderr())
    if _log.level == logging.NOTSET:
        _log.setLevel(logging.INFO)
    _log.log(logging.INFO if report.complete else logging.WARNING, "gemma-fold: %s", report)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is when something is written."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        raise AttributeError("it always is sys.stderr")
