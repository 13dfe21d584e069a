"""What the outputs of two sides prove: that they differ, that they agree, or neither.

A difference needs a number that lies beyond what is tolerated. Agreement needs more than the
absence of one: numbers that are numbers, lists of top tokens to compare, and enough positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gemma_fold.compare.outputs.results import Outputs, OutputStats

#: Positions at which two servers must have listed their top tokens, and the share of all positions.
_FEWEST, _LISTED = 16, 0.9
#: Top tokens that agree, as a share of how many do if A is asked again.
_AGREEMENT = 0.5
_SIGMAS = 4


def differences(outputs: Outputs, max_kl: float | None) -> Iterator[str]:
    """What differs beyond `max_kl`, or without it beyond the noise floor."""
    stats, floor = outputs.stats, outputs.floor
    exact = stats.vocabulary is not None
    if exact and stats.non_finite > stats.undefined:
        count = stats.non_finite - stats.undefined
        yield f"logits are finite on one side only at {count:,} positions"
    elif any(stats.invalid):
        return
    elif stats.identical:
        apart = [c for c in outputs.greedy if c.diverges_at is not None]
        if apart:
            same = "logits" if exact else "log-probabilities"
            yield f"{len(apart)} greedy continuations diverge, though the {same} are identical"
    elif max_kl is not None:
        if not stats.mean_kl <= max_kl:
            yield f"mean KL {stats.mean_kl:.3g} is over {max_kl:g}"
        elif not exact:
            yield from _beside_the_bound(stats, floor, max_kl)
    elif floor is None or not stats.mean_kl <= floor.mean_kl:
        beyond = f", beyond the noise floor of {floor.mean_kl:.3g}" if floor else ""
        agreement = (
            "" if math.isnan(stats.same_top) else f", same top token at {stats.same_top:.2%}"
        )
        yield f"predictions differ: mean KL {stats.mean_kl:.3g}{beyond}{agreement}"
    elif not exact:
        yield from _beside_the_bound(stats, floor, floor.mean_kl)


def _beside_the_bound(
    stats: OutputStats, floor: OutputStats | None, tolerated: float
) -> Iterator[str]:
    """Of the top k the KL is a lower bound, so a small one does not settle it."""
    for what, here, again in (
        ("the top token is the same at", stats.same_top, floor.same_top if floor else 1.0),
        (f"the top {stats.top_k} have in common", stats.overlap, floor.overlap if floor else 1.0),
    ):
        if here < _AGREEMENT * again:
            asked = f", and {again:.2%} when A is asked again" if floor else ""
            yield f"{what} {here:.2%}{asked}"
            return
    # Logits that are s apart make a KL of s^2 / 2, and move log-probabilities by s.
    if abs(stats.ln_ratio) - _SIGMAS * stats.ln_ratio_sigma > math.sqrt(2 * tolerated):
        yield f"perplexity is {stats.perplexity_a:.4g} and {stats.perplexity_b:.4g}"


def gaps(outputs: Outputs, max_kl: float | None) -> Iterator[str]:
    """What is missing for a verdict, and what to do about it."""
    stats, floor = outputs.stats, outputs.floor
    if stats.vocabulary is not None:
        if stats.undefined:
            yield (
                f"logits of A and B are not finite at {stats.undefined:,} of "
                f"{stats.positions:,} positions; try --dtype float32, or check the model"
            )
        return
    of = f"of {stats.positions:,} positions"
    if any(stats.invalid):
        yield (
            f"{_who(stats.invalid, 'returns', 'return')} log-probabilities that are missing, not "
            f"finite, over 0 or add up to more than 1, at {max(stats.invalid):,} {of}; look "
            "into the server's log, or use another one"
        )
    elif stats.listed < _LISTED * stats.positions:
        yield (
            f"{_who(stats.unlisted, 'lists', 'list')} no top tokens at "
            f"{stats.positions - stats.listed:,} {of}; use a server that answers logprobs with them"
        )
    elif stats.listed < _FEWEST:
        were = "position was" if stats.listed == 1 else "positions were"
        yield f"{stats.listed} {were} compared, {_FEWEST} are the least; give a longer --text"
    elif max_kl is None and not stats.identical and floor and not floor.same_top >= _AGREEMENT:
        yield (
            f"A asked again has the same top token at {floor.same_top:.2%}, so its noise hides "
            "any difference; give --max-kl, or a server that answers the same twice"
        )


def _who(counts: tuple[int, int], one: str, two: str) -> str:
    sides = [side for side, count in zip("AB", counts, strict=True) if count]
    return f"{' and '.join(sides)} {one if len(sides) == 1 else two}"
