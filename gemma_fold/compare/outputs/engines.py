"""Side A or B run by vLLM or SGLang, offline: the top k at every position, as from its server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from gemma_fold.compare.outputs import sglang, vllm
from gemma_fold.compare.outputs.backend import Backend, EngineSide, Ids, Listed
from gemma_fold.compare.outputs.server import Position
from gemma_fold.compare.outputs.tokens import Tokens
from gemma_fold.engines.mode import VARIABLE

Text = str | Ids
Decoded = tuple[list[list[Position]], list[list[Position]]]  # the same tokens one by one, at once
#: Tokens of a text that are decoded on a CPU to find the noise floor; on a GPU half of it is.
_CPU_DECODED = 32


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that runs checkpoints here.

    Attributes:
        prepare: checks that it is there, before anything is read.
        start: a side, a dtype, the longest text with its continuation, and how many tokens there
            may be at once.
        eager: its eager mode in words.
    """

    prepare: Callable[[], None]
    start: Callable[[EngineSide, str, int, int], Backend]
    eager: str


ENGINES = {
    "vllm": Engine(vllm.prepare, vllm.start, "vLLM's eager mode, not compiled"),
    "sglang": Engine(sglang.prepare, sglang.start, "SGLang's eager mode, without CUDA graphs"),
}


class Asked:
    """A source of :mod:`gemma_fold.compare.outputs.top_k`: an engine, its ids spelled as tokens."""

    def __init__(
        self, engine: str, backend: Backend, name: Callable[[int], str], tokens: Tokens
    ) -> None:
        self._backend = backend
        self._name = name
        self._tokens = tokens
        self._on_cpu = backend.device == "cpu"
        self.name = f"{engine}, {backend.dtype} on {backend.device}"
        #: On a CPU nothing is compiled.
        self.eager = "" if self._on_cpu else ENGINES[engine].eager

    def read(self, text: Text) -> list[Position]:
        return self.read_together([text])[0]

    def read_together(self, texts: Sequence[Text]) -> list[list[Position]]:
        ids = [_ids(text) for text in texts]
        answers = self._backend.continue_all(ids, 1, reads=True)
        return [
            self._positions(text[1:], answer.read)
            for text, answer in zip(ids, answers, strict=True)
        ]

    def read_decoded(self, texts: Sequence[Text]) -> Decoded:
        """The second halves of the texts as the model continues the first, drawn by its own odds.

        As they were decoded, one token of every text at a time, and as they are read at once.
        """
        halves = [len(text) // 2 for text in texts]
        starts = [_ids(text)[:half] for text, half in zip(texts, halves, strict=True)]
        tokens = min(len(text) - half for text, half in zip(texts, halves, strict=True))
        tokens = min(tokens, _CPU_DECODED) if self._on_cpu else tokens
        answers = self._backend.continue_all(starts, tokens, draws=True)
        decoded = [self._positions(answer.ids, answer.drawn) for answer in answers]
        whole = [start + answer.ids for start, answer in zip(starts, answers, strict=True)]
        read = [self.read(text) for text in whole]
        return decoded, [row[len(start) - 1 :] for row, start in zip(read, starts, strict=True)]

    def continue_greedily(self, text: Text, tokens: int) -> tuple[tuple[str, ...], str]:
        ids = self._backend.continue_all([_ids(text)], tokens)[0].ids
        return tuple(map(self._name, ids)), self._tokens.text(ids)

    def _positions(self, ids: Ids, listed: Sequence[Listed]) -> list[Position]:
        return [
            Position(self._name(token), one.logprob, {self._name(i): p for i, p in one.top.items()})
            for token, one in zip(ids, listed, strict=True)
        ]


@contextmanager
def running(
    side: EngineSide, tokens: Tokens, dtype: str, new_tokens: int, name: Callable[[int], str]
) -> Iterator[Asked]:
    """Start the engine on the checkpoint, and end it.

    `name` spells a token.

    Raises:
        UnsupportedModelError: the engine does not run the checkpoint.
    """
    windows = [len(window) + 1 for window in tokens.windows]
    prompts = [len(prompt.ids) + new_tokens for prompt in tokens.prompts]
    with _mode_of(side):
        backend = ENGINES[side.engine].start(side, dtype, max(windows + prompts), sum(windows))
    try:
        yield Asked(side.engine, backend, name, tokens)
    finally:
        backend.close()


@contextmanager
def _mode_of(side: EngineSide) -> Iterator[None]:
    """GEMMA_FOLD as it is for a folded side, and unset for an original.

    In native mode engines fold an original as it loads: it would be compared with itself.
    """
    value = None if side.side.folded else os.environ.pop(VARIABLE, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[VARIABLE] = value


def _ids(text: Text) -> Ids:
    assert not isinstance(text, str)
    return text
