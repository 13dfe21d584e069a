"""A file alone: how often its norms were offset, as far as their own bits and statistics tell.

The bits are proof of a kind. Trained weights are numbers of bfloat16 or float16; where every
number of a float32 tensor is one of those plus 1, and not so without the 1, somebody added it.
Statistics are a guess: trained gains are seldom negative, and some are always below 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gemma_fold.compare.offsets.expectation import NormRule, expected_additions, may_round
from gemma_fold.compare.offsets.finding import held
from gemma_fold.compare.weights.norms import ROUNDINGS
from gemma_fold.format.arithmetic import Float32

#: Numbers that must speak against all other readings before one is believed.
_ENOUGH = 64
#: Numbers without which no share means anything.
_FEWEST = 256
#: Shares of elements. Of the real Gemma 3 270M, 0.3 % of the gains are negative and 12 % below 1.
_SELDOM, _OFTEN = 0.02, 0.02


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a file says by itself.

    Attributes:
        expected: how often the file should have added the offset.
        added: how often it looks as if it had; None where nothing tells.
        rounding: "bf16" or "fp16" where its numbers show that gamma was rounded.
        sure: "bits", "statistics" or "no".
        right: whether that is what the file should hold; None where nothing tells.
        norms: zero-centred norms that were read.
        elements: weights in them.
        mean: of the stored numbers.
        reasons: in words.
    """

    expected: int
    added: int | None
    rounding: str
    sure: str
    right: bool | None
    norms: int
    elements: int
    mean: float
    reasons: tuple[str, ...]


def weigh(
    form: str, told: str | None, rules: Mapping[str, NormRule], values: Mapping[str, Float32]
) -> Evidence | None:
    """What the zero-centred norms of a file say; None where it has none of offset 1."""
    chosen = {
        key: values[key]
        for key, rule in rules.items()
        if key in values and rule.zero_centred and rule.offset == 1.0
    }
    if not chosen:
        return None
    # Formats do not mix: all norms of one family hold the same.
    expected = expected_additions(form, rules[next(iter(chosen))], told)
    pooled = np.concatenate(list(chosen.values()))
    pooled = pooled[np.isfinite(pooled)]
    mean = float(pooled.mean(dtype=np.float64)) if pooled.size else float("nan")
    added, rounding, sure, reasons = _conclude(pooled, expected)
    right = None
    if added is not None or rounding:
        right = added in (expected, None) and (not rounding or (may_round(form) and expected > 0))
    return Evidence(
        expected, added, rounding, sure, right, len(chosen), pooled.size, mean, tuple(reasons)
    )


def _conclude(pooled: Float32, expected: int) -> tuple[int | None, str, str, list[str]]:
    guess, guess_reason = _by_shares(pooled)
    added, reason = _by_bits(pooled)
    if added is not None:
        return added, "", "bits", [reason, guess_reason]
    grid = _grid(pooled)
    if guess and (finer := _finer_than_sums(pooled, grid)):
        guess = None
        guess_reason += f"; but {finer:,} of them are finer than any sum with 1"
    if grid and expected > 0:
        # Either w, or a gamma that was rounded: what float32 gamma would be, it is not.
        reason = f"all {pooled.size:,} numbers fit {grid}, as those of w or of a rounded gamma do"
        sure = "statistics" if guess is not None else "no"
        return guess, grid if guess else "", sure, [reason, guess_reason]
    through = _through_gamma(pooled, grid) if grid else ""
    if through and guess in (0, None):
        reason = (
            f"every number comes back unchanged from 1 + w in {through}, as only weights do that "
            "were rounded like this before"
        )
        return 0, through, "bits", [reason, guess_reason]
    return guess, "", "no" if guess is None else "statistics", [guess_reason]


def _grid(pooled: Float32) -> str:
    """The 16-bit dtype that all numbers fit, or ""."""
    for how in ("bf16", "fp16"):
        if np.array_equal(ROUNDINGS[how](pooled), pooled):
            return how
    return ""


def _finer_than_sums(pooled: Float32, grid: str) -> int:
    """How many numbers are no sum with 1 in their dtype: small weights, never added to."""

    def rounded(values: Float32) -> Float32:
        return ROUNDINGS[grid](values) if grid else values

    with np.errstate(over="ignore", invalid="ignore"):
        again = rounded(rounded(pooled - np.float32(1)) + np.float32(1))
    return int(np.count_nonzero(again != pooled))


def _by_bits(pooled: Float32) -> tuple[int | None, str]:
    """How often 1 was added to numbers of a 16-bit dtype, where only one answer explains all."""
    for how in ("bf16", "fp16"):
        fits = [_is_sum(pooled, times, how) for times in range(4)]
        whole = [times for times, fit in enumerate(fits) if fit.all()]
        if len(whole) != 1 or whole == [0]:
            continue
        against = min(int(np.count_nonzero(~fit)) for n, fit in enumerate(fits) if n != whole[0])
        if against >= _ENOUGH:
            times = whole[0]
            return times, (
                f"all {pooled.size:,} numbers are {times} plus a number of {how}, and at least "
                f"{against:,} of them are no other count of ones plus one"
            )
    return None, ""


def _is_sum(values: Float32, times: int, how: str) -> npt.NDArray[np.bool_]:
    """Which values are float32 sums of a 16-bit number and `times` ones."""
    with np.errstate(over="ignore", invalid="ignore"):
        again = ROUNDINGS[how](values - np.float32(times))
        for _ in range(times):
            again = again + np.float32(1)
    fits: npt.NDArray[np.bool_] = again == values
    return fits


def _through_gamma(pooled: Float32, stored: str) -> str:
    """The 16-bit dtype in which all numbers were 1 + w before they were stored as `stored`."""
    last_bit = np.uint32(1 << 16 if stored == "bf16" else 1 << 13)
    neighbours = (pooled.view(np.uint32) ^ last_bit).view(np.float32)
    for how in ("bf16", "fp16"):
        # Of weights that were never rounded, half are as good as their neighbours in the last bit.
        if _survives(pooled, how, stored).all():
            against = int(np.count_nonzero(~_survives(neighbours, how, stored)))
            if against >= _ENOUGH:
                return how
    return ""


def _survives(values: Float32, how: str, stored: str) -> npt.NDArray[np.bool_]:
    """Which values come back as they are from a gamma in a 16-bit dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        gamma = ROUNDINGS[how](values + np.float32(1))
        same: npt.NDArray[np.bool_] = ROUNDINGS[stored](gamma - np.float32(1)) == values
    return same


def _by_shares(pooled: Float32) -> tuple[int | None, str]:
    if pooled.size < _FEWEST:
        return None, f"{pooled.size} numbers are too few for statistics"
    below = {n: float(np.mean(pooled < n)) for n in (-1, 0, 1, 2, 3)}
    told = (
        f"mean {pooled.mean(dtype=np.float64):.3g}; {below[-1]:.1%} are below -1, "
        f"{below[0]:.1%} below 0, {below[1]:.1%} below 1, {below[2]:.1%} below 2"
    )
    fits = [n for n in range(4) if n in below and below[n] >= _OFTEN and below[n - 1] < _SELDOM]
    if len(fits) != 1:
        return None, told + ": that fits no reading, or more than one"
    return fits[0], told + f": looks like {held(fits[0])}"
