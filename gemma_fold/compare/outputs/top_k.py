"""Compare two running models on the same tokens, if at least one returns the top k alone.

A server, vLLM or SGLang returns the k most likely tokens, not the whole distribution. The
divergences here are those of the distributions over the tokens that both sides list and one more
outcome, "any other token", made larger if the lists prove more (see `bounds`): lower bounds of the
true ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from gemma_fold.checkpoint.progress import Progress
from gemma_fold.compare.outputs import engines
from gemma_fold.compare.outputs.backend import EngineSide
from gemma_fold.compare.outputs.bounds import ceiling, is_valid, known, least_kl
from gemma_fold.compare.outputs.logits import Settings, engine_name
from gemma_fold.compare.outputs.results import Continuation, Outputs, first_difference
from gemma_fold.compare.outputs.server import TOP_K, Endpoint, Position
from gemma_fold.compare.outputs.stats import Rows, join, noisiest, summarize
from gemma_fold.compare.outputs.tokens import PROMPTS, NothingInCommonError, Tokens, read_text
from gemma_fold.compare.outputs.transformers import Model, running
from gemma_fold.compare.sides import Side

_LETTERS = 3000  # a passage of text, if only the server can count tokens

Text = str | tuple[int, ...]
Positions = list[Position]
Party = Side | Endpoint | EngineSide


@dataclass(frozen=True, slots=True)
class Reading:
    """One side's answers: positions of every passage, and greedy continuations with their text.

    `engine` and `eager` are the source's.
    """

    passages: list[Positions]
    greedy: list[tuple[tuple[str, ...], str]]
    engine: str
    eager: str


class Source(Protocol):
    """A side that can be asked.

    Attributes:
        name: for people.
        eager: a mode of it that runs other code, in words; empty if there is none.
    """

    @property
    def name(self) -> str: ...

    @property
    def eager(self) -> str: ...

    def read(self, text: Text) -> Positions:
        """Every token of `text` but the first, with the top k in its place."""

    def read_together(self, texts: Sequence[Text]) -> list[Positions]:
        """The same for many texts, all at once if the engine can."""

    def read_decoded(self, texts: Sequence[Text]) -> engines.Decoded | None:
        """Its continuations of the texts, as served and as read; None if it has none."""

    def continue_greedily(self, text: Text, tokens: int) -> tuple[tuple[str, ...], str]:
        """Tokens and text of the most likely continuation."""


class _Server:
    eager = ""

    def __init__(self, endpoint: Endpoint, by_id: bool) -> None:
        self._endpoint, self._by_id = endpoint, by_id
        self.name = f"{endpoint.url}, model {endpoint.model}"

    def read(self, text: Text) -> Positions:
        return self._endpoint.read(text, by_id=self._by_id)

    def read_together(self, texts: Sequence[Text]) -> list[Positions]:
        with ThreadPoolExecutor(len(texts)) as pool:
            return list(pool.map(self.read, texts))

    def read_decoded(self, texts: Sequence[Text]) -> engines.Decoded | None:
        return None

    def continue_greedily(self, text: Text, tokens: int) -> tuple[tuple[str, ...], str]:
        return self._endpoint.continue_greedily(text, tokens, by_id=self._by_id)


class _Local:
    eager = ""

    def __init__(
        self, model: Model, tokens: Tokens, settings: Settings, name: Callable[[int], str]
    ) -> None:
        self._model, self._tokens, self._name = model, tokens, name
        self.name = engine_name(model, settings.device)

    def read(self, text: Text) -> Positions:
        assert not isinstance(text, str)
        logprobs = self._model.logits((text,))[0].double().log_softmax(-1).cpu()
        best = logprobs.topk(min(TOP_K, logprobs.shape[-1]))
        return [
            Position(
                self._name(token),
                float(logprobs[at, token]),
                {self._name(i): p for i, p in zip(ids.tolist(), values.tolist(), strict=True)},
            )
            for at, (token, ids, values) in enumerate(
                zip(text[1:], best.indices[:-1], best.values[:-1], strict=True)
            )
        ]

    def read_together(self, texts: Sequence[Text]) -> list[Positions]:
        return [self.read(text) for text in texts]

    def read_decoded(self, texts: Sequence[Text]) -> engines.Decoded | None:
        return None

    def continue_greedily(self, text: Text, tokens: int) -> tuple[tuple[str, ...], str]:
        prompt = next(p for p in self._tokens.prompts if p.ids == text)
        ids = self._model.continue_greedily(prompt.ids, tokens)
        return tuple(map(self._name, ids)), self._tokens.text(ids)


def compare_top(
    a: Party,
    b: Party,
    tokens: Tokens | None,
    text: Path | None,
    prompts: int,
    settings: Settings,
    progress: Progress,
) -> Outputs:
    """Compare the top k if A or B is a server or run by an engine of `engines.ENGINES`.

    `tokens` is None if both are servers. A side that is a checkpoint is run by transformers.

    Raises:
        NothingInCommonError: the tokens differ.
        HostError: a server is down, too slow, or returns no log-probabilities.
    """
    by_id = all([e.names_ids() for e in (a, b) if isinstance(e, Endpoint)])
    passages, starts, names, origin = _texts(tokens, text, prompts)
    progress.start_steps(2 * len(passages), 2)
    readings = []
    ways: list[tuple[Rows, str]] = []  # in which A was asked again
    for number, side in enumerate((a, b), 1):
        with _source(side, tokens, settings, by_id) as source:
            readings.append(_read(source, passages, starts, settings, progress, number))
            if number == 1 and not isinstance(side, Side) and settings.noise_floor:
                ways += _asked_again(source, passages, readings[0].passages)
    one, two = readings
    if ways and isinstance(a, EngineSide) and one.eager:
        with _source(replace(a, eager=True), tokens, settings, by_id) as source:
            again = compare_positions(one.passages, [source.read(text) for text in passages])
        ways.append((again, f"A run again in {one.eager}"))
    progress.finish()
    rows = compare_positions(one.passages, two.passages)
    top_k = _shortest(readings)
    noise, how = noisiest(ways) if ways else (None, "")
    return Outputs(
        stats=summarize(rows, vocabulary=None, top_k=top_k),
        floor=summarize(noise, vocabulary=None, top_k=top_k) if noise else None,
        floor_how=how,
        greedy=tuple(
            Continuation(name, max(len(x[0]), len(y[0])), first_difference(x[0], y[0]), x[1], y[1])
            for name, x, y in zip(names, one.greedy, two.greedy, strict=True)
        ),
        text=origin,
        windows=len(passages),
        context=len(passages[0]) if tokens else 0,
        engines=(one.engine, two.engine),
        kl=(rows.kl_ab, noise.kl_ab if noise else None),
    )


def _asked_again(
    source: Source, passages: Sequence[Text], alone: list[Positions]
) -> Iterator[tuple[Rows, str]]:
    """A against itself, and how it was asked."""
    together = compare_positions(alone, source.read_together(passages))
    yield together, "A asked again, all passages at once instead of one by one"
    if decoded := source.read_decoded(passages):
        rows = compare_positions(*decoded)
        count = len(rows.kl_ab)
        yield rows, f"A's own continuations, {count} tokens decoded one at a time, read at once"


def _texts(
    tokens: Tokens | None, path: Path | None, prompts: int
) -> tuple[Sequence[Text], Sequence[Text], Sequence[str], str]:
    """Passages, prompts, the prompts as people read them, and where the text is from."""
    if tokens is not None:
        names = [prompt.text or tokens.text(prompt.ids) for prompt in tokens.prompts]
        return tokens.windows, [prompt.ids for prompt in tokens.prompts], names, tokens.origin
    text, origin = read_text(path)
    return _passages(text), PROMPTS[:prompts], PROMPTS[:prompts], origin


def _passages(text: str) -> list[str]:
    """Passages of whole lines, of about `_LETTERS` characters each."""
    passages = [""]
    for line in text.splitlines(keepends=True):
        if len(passages[-1]) + len(line) > _LETTERS and passages[-1]:
            passages.append("")
        passages[-1] += line
    return [passage for passage in passages if passage.strip()]


@contextmanager
def _source(
    side: Party, tokens: Tokens | None, settings: Settings, by_id: bool
) -> Iterator[Source]:
    if isinstance(side, Endpoint):
        yield _Server(side, by_id)
        return
    assert tokens is not None
    reading = tokens

    def name(token: int) -> str:
        return f"token_id:{token}" if by_id else reading.text((token,))

    if isinstance(side, EngineSide):
        with engines.running(side, tokens, settings.dtype, settings.new_tokens, name) as engine:
            yield engine
        return
    with running(side, settings.dtype, settings.device) as model:
        yield _Local(model, tokens, settings, name)


def _read(
    source: Source,
    passages: Sequence[Text],
    starts: Sequence[Text],
    settings: Settings,
    progress: Progress,
    number: int,
) -> Reading:
    read = []
    for index, passage in enumerate(passages, 1):
        progress.file(f"{'AB'[number - 1]}, passage {index}", number)
        read.append(source.read(passage))
        progress.advance(1)
    greedy = [source.continue_greedily(start, settings.new_tokens) for start in starts]
    return Reading(read, greedy, source.name, source.eager)


def compare_positions(a: list[Positions], b: list[Positions]) -> Rows:
    """Statistics of two readings. Raises NothingInCommonError if the tokens differ."""
    parts = []
    for one, two in zip(a, b, strict=True):
        if [p.token for p in one] != [p.token for p in two]:
            raise NothingInCommonError(
                "the two sides split the text into different tokens, so their vocabularies "
                "differ and there is nothing in common to compare"
            )
        parts += [_compare(x, y) for x, y in zip(one, two, strict=True)]
    return join(parts)


def _compare(a: Position, b: Position) -> Rows:
    p, q = known(a), known(b)
    shared = p.keys() & q.keys()
    listed = min(len(a.top), len(b.top), TOP_K)
    first_a, first_b = (_best(side.top, listed) for side in (a, b))
    invalid = (not is_valid(a), not is_valid(b))
    gaps = [abs(p[token] - q[token]) for token in shared]
    same = first_a == first_b and max(gaps) == 0
    finite = not any(invalid)
    return Rows(
        kl_ab=np.array([least_kl(p, q, ceiling(a), ceiling(b)) if finite else math.nan]),
        kl_ba=np.array([least_kl(q, p, ceiling(b), ceiling(a)) if finite else math.nan]),
        same_top=np.array([first_a[:1] == first_b[:1]]),
        overlap=np.array([len({*first_a} & {*first_b}) / max(1, listed)]),
        differing=np.array([0 if same else 1]),
        max_abs=np.array([max(gaps) if finite else 0.0]),
        finite=np.array([finite]),
        nll_a=np.array([math.nan if invalid[0] else -a.logprob]),
        nll_b=np.array([math.nan if invalid[1] else -b.logprob]),
        invalid=np.array([invalid]),
        unlisted=np.array([(not a.top, not b.top)]),
    )


def _best(top: Mapping[str, float], count: int) -> list[str]:
    # By name among equals, so that both sides break ties alike.
    return sorted(top, key=lambda token: (-top[token], token))[:count]


def _shortest(readings: Sequence[Reading]) -> int:
    """Tokens that every list has, `TOP_K` at most; some servers list fewer than they are asked."""
    lists = (len(p.top) for reading in readings for row in reading.passages for p in row if p.top)
    return min(TOP_K, min(lists, default=TOP_K))
