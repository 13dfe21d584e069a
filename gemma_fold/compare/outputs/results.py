"""What an output comparison finds; plain data, so that reports need no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
"""Those that llama.cpp's `llama-perplexity --kl-divergence` prints."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distribution:
    """One number over positions.

    Attributes:
        percentiles: those in `PERCENTILES`, in their order.
    """

    mean: float
    min: float
    max: float
    percentiles: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class OutputStats:
    """How far side B's predictions are from side A's.

    Attributes:
        positions: compared.
        scored: positions with a next token to be predicted.
        vocabulary: logits at each position; None if only the top k were known.
        top_k: k of the overlap, and of everything if only the top k were known.
        differing: logits whose value differs; None if only the top k were known.
        positions_differing: positions with at least one.
        max_abs: largest difference of two logits (of two log-probabilities if only the top k
            were known).
        kl_ab, kl_ba: KL(A||B) and KL(B||A) in nats; a lower bound if only the top k were known.
        same_top, same_top_sigma: share of positions with the same most likely token, and the
            standard error of that share.
        overlap: mean share of the top k tokens that both have in theirs.
        perplexity_a, perplexity_b: of the text.
        ln_ratio, ln_ratio_sigma: mean of ln(PPL B / PPL A) and its standard error.
        delta_p_mean, delta_p_rms: change of the probability of the token that follows.
        non_finite: positions with a NaN or an infinite logit on one side only, or a NaN on both.
        invalid: of A and of B, positions without probabilities: a NaN, an infinity, a sum over 1.
        undefined: positions where both have none.
        unlisted: of A and of B, positions without a list of top tokens.
        listed: positions where both have one; `same_top` and `overlap` are of these.
    """

    positions: int
    scored: int
    vocabulary: int | None
    top_k: int
    differing: int | None
    positions_differing: int
    max_abs: float
    kl_ab: Distribution
    kl_ba: Distribution
    same_top: float
    same_top_sigma: float
    overlap: float
    perplexity_a: float
    perplexity_b: float
    ln_ratio: float
    ln_ratio_sigma: float
    delta_p_mean: float
    delta_p_rms: float
    non_finite: int
    invalid: tuple[int, int]
    undefined: int
    unlisted: tuple[int, int]
    listed: int

    @property
    def identical(self) -> bool:
        """Whether no value differs."""
        return self.positions_differing == 0 and self.non_finite == 0

    @property
    def ratio(self) -> float:
        """PPL(B) / PPL(A)."""
        return math.exp(self.ln_ratio)

    @property
    def mean_kl(self) -> float:
        """The larger of the two mean divergences."""
        return max(self.kl_ab.mean, self.kl_ba.mean)


@dataclass(frozen=True, slots=True)
class Continuation:
    """A greedy continuation on both sides.

    Attributes:
        prompt: what was continued, as text.
        tokens: length of the longer continuation.
        diverges_at: index of the first token that differs, or None.
        a, b: the continuations as text.
    """

    prompt: str
    tokens: int
    diverges_at: int | None
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outcome of the output comparison.

    Attributes:
        stats: B against A.
        floor: A against itself, run differently; None if that was not measured.
        floor_how: what was different.
        greedy: continuations of the prompts.
        text: where the tokens come from.
        windows, context: how many windows of how many tokens; 0 if the server tokenized.
        engines: what ran A and B, with dtype and device.
        kl: KL(A||B) at every position, and the same of the floor: what the histogram is made of.
    """

    stats: OutputStats
    floor: OutputStats | None
    floor_how: str
    greedy: tuple[Continuation, ...]
    text: str
    windows: int
    context: int
    engines: tuple[str, str]
    kl: tuple[Floats, Floats | None]


def first_difference(a: Sequence[object], b: Sequence[object]) -> int | None:
    """Index of the first element that differs, or that only one side has."""
    for index, (one, two) in enumerate(zip(a, b, strict=False)):
        if one != two:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))
