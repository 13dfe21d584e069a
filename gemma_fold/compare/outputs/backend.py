"""What an engine is asked and answers in token ids alone, whichever engine it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gemma_fold.compare.sides import Side
from gemma_fold.errors import UnsupportedModelError

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineSide:
    """A checkpoint that an engine of `engines.ENGINES` runs, by its name there."""

    side: Side
    engine: str
    eager: bool = False  # without torch.compile and CUDA graphs, even on a GPU


@dataclass(frozen=True, slots=True)
class Listed:
    """The log-probability of one token, and those of the most likely ones in its place."""

    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """One text continued.

    Attributes:
        ids: the tokens that continue it.
        read: of every token of the text but the first, where that was asked for.
        drawn: of every token that continues it, where those were drawn.
    """

    ids: Ids
    read: Sequence[Listed] = ()
    drawn: Sequence[Listed] = ()


class Backend(Protocol):
    """A checkpoint that an engine is running."""

    dtype: str
    device: str

    def continue_all(
        self, texts: Sequence[Ids], tokens: int, *, reads: bool = False, draws: bool = False
    ) -> list[Answer]:
        """Continue the texts, all at once: greedily, or drawn by the model's own odds.

        `reads` asks for log-probabilities of the texts, `draws` draws and asks for those of what
        was drawn. Only greedy continuations end where the model ends them.
        """

    def close(self) -> None:
        """End it, and free its memory."""


def does_not_run(engine: str, side: EngineSide, reason: str) -> UnsupportedModelError:
    """The error of an engine that does not run the checkpoint, or that ended while it did."""
    return UnsupportedModelError(
        f"{engine} does not run {side.side.name} ({reason}); its log is above, and "
        "--no-outputs compares weights alone"
    )
