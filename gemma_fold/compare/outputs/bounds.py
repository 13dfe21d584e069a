"""How far two distributions are apart at least, from the most likely tokens of each.

Merging outcomes never increases a divergence. The outcomes here are the tokens that both sides
list, those that one side alone lists, and all others. A token that a side does not list is at most
as likely there as the last one it lists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from gemma_fold.compare.outputs.server import Position

_SMALLEST = 1e-9  # probability of "any other token": what rounding leaves of it is not below
#: Servers round: by how much a log-probability may be over 0, and a sum of probabilities over 1.
_OVER_ZERO, _OVER_ONE = 1e-3, 1e-2


def known(position: Position) -> dict[str, float]:
    """Log-probabilities that a side returns: of its list, and of the token that follows."""
    return {**position.top, position.token: position.logprob}


def ceiling(position: Position) -> float:
    """The log-probability that no token outside of the list exceeds.

    Without the token that follows: servers add it to the list, however unlikely it is.
    """
    ranked = [p for token, p in position.top.items() if token != position.token]
    return min(ranked, default=0.0)


def is_valid(position: Position) -> bool:
    """Whether what a side returns can be log-probabilities."""
    given = (*position.top.values(), position.logprob)
    if any(not math.isfinite(p) or p > _OVER_ZERO for p in given):
        return False
    return math.fsum(map(math.exp, known(position).values())) <= 1 + _OVER_ONE


def least_kl(
    p: Mapping[str, float], q: Mapping[str, float], ceiling_p: float, ceiling_q: float
) -> float:
    """The larger of two lower bounds of KL(P||Q), from what is known of both."""
    shared = p.keys() & q.keys()
    total = math.fsum(math.exp(p[token]) * (p[token] - q[token]) for token in shared)
    rest_p = max(_SMALLEST, 1 - math.fsum(math.exp(p[token]) for token in shared))
    rest_q = max(_SMALLEST, 1 - math.fsum(math.exp(q[token]) for token in shared))
    only_p, only_q = p.keys() - shared, q.keys() - shared
    # Tokens in one list alone, apart from all others: how likely they are is known of one side, how
    # likely at most of the other. Up to there it is free, and closest in proportion to the rest.
    mass_p = min(rest_p, math.fsum(math.exp(p[token]) for token in only_p))
    mass_q = min(rest_q, math.fsum(math.exp(q[token]) for token in only_q))
    most_q = min(len(only_p) * math.exp(ceiling_q), mass_p * rest_q / rest_p)
    most_p = min(len(only_q) * math.exp(ceiling_p), mass_q * rest_p / rest_q)
    bounds = (
        _term(mass_p, most_q) + _term(rest_p - mass_p, rest_q - most_q),
        _term(most_p, mass_q) + _term(rest_p - most_p, rest_q - mass_q),
    )
    return max(0.0, total + max(bounds))


def _term(p: float, q: float) -> float:
    return p * math.log(p / max(q, _SMALLEST)) if p > 0 else 0.0
