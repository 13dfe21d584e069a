"""One norm of a file beside the original's: how often the offset was added, and what else became
of it.

Patterns are exact, element by element: w with the offset added so many times, each sum in float32
or rounded to 16 bits. Only what fits no pattern is fitted.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gemma_fold.compare.offsets.finding import Finding, NormCheck, finding_of, pattern_remark
from gemma_fold.compare.offsets.fits import by_fit
from gemma_fold.compare.offsets.original import Catalogue, Original
from gemma_fold.compare.weights.norms import same_numbers, ulp_distance
from gemma_fold.format.arithmetic import Float32


def check_norm(
    original: Original,
    values: Float32,
    expected: int,
    catalogue: Catalogue,
    *,
    rounding_is_right: bool = False,
    scaling_is_right: bool = False,
) -> NormCheck:
    """What became of a norm; `values` are those of the file, widened to float32.

    `rounding_is_right` is true of formats that keep gamma in the dtype of the weights, and
    `scaling_is_right` of quantizers that scale the channels of a norm and of what follows it.
    """
    if values.size != original.values.size:
        return NormCheck(
            name=original.rule.key,
            finding=Finding.SHAPE,
            expected=expected,
            elements=values.size,
            remark=f"{values.size} elements instead of {original.values.size}",
        )
    found = _by_pattern(original, values, expected)
    if found is None:
        found = _by_place(original, values, expected, catalogue)
    if found is None:
        found = by_fit(original, values, expected)
    found = replace(
        found, elements=values.size, right=_right(found, rounding_is_right, scaling_is_right)
    )
    if found.finding in (Finding.SAME, Finding.FOLDED):
        return found
    wanted = original.exact(expected)
    differs = (values != wanted) & ~(np.isnan(values) & np.isnan(wanted))
    ulp = _gain_ulp(original, values, expected, differs)
    return replace(found, changed=int(np.count_nonzero(differs)), max_ulp=ulp)


def _gain_ulp(
    original: Original, values: Float32, expected: int, differs: npt.NDArray[np.bool_]
) -> int:
    """The largest error of the gain that a reader computes of `values`."""
    zero_centred = original.rule.zero_centred
    offset = np.float32(original.rule.offset if zero_centred and not expected else 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        distance = ulp_distance(values + offset, original.exact(1 if zero_centred else 0))
    return int(np.where(differs, distance, 0).max(initial=0))


def _right(found: NormCheck, rounding: bool, scaling: bool) -> bool:
    if found.finding in (Finding.SAME, Finding.FOLDED):
        return True
    if found.finding is Finding.ROUNDED:
        return rounding and found.expected > 0
    return scaling and found.finding is Finding.SCALED and found.added == found.expected


def _by_pattern(original: Original, values: Float32, expected: int) -> NormCheck | None:
    others = [n for n in (0, 1, 2, 3, -1) if n != expected]
    for additions in (expected, *others):
        if _is(original, values, additions):
            return _found(original, expected, additions, "")
        for how, rounded in original.rounded(additions):
            if same_numbers(values, rounded):
                return _found(original, expected, additions, how)
    return None


def _is(original: Original, values: Float32, additions: int) -> bool:
    if same_numbers(values, original.exact(additions)):
        return True
    # The w of a gamma is not always gamma - offset: any that gives the same gamma is as good.
    if original.added and additions == 0:
        with np.errstate(over="ignore", invalid="ignore"):
            return same_numbers(values + np.float32(original.rule.offset), original.values)
    return False


def _found(original: Original, expected: int, added: int, rounding: str) -> NormCheck:
    return NormCheck(
        name=original.rule.key,
        finding=finding_of(expected, added, rounding),
        expected=expected,
        added=added,
        rounding=rounding,
        remark=pattern_remark(original.rule, expected, added, rounding),
    )


def _by_place(
    original: Original, values: Float32, expected: int, catalogue: Catalogue
) -> NormCheck | None:
    key = original.rule.key
    owner = catalogue.owner(values)
    if owner is not None and owner != key:
        return NormCheck(
            name=key,
            finding=Finding.OTHER_NORM,
            expected=expected,
            of=owner,
            remark=f"holds {owner}",
        )
    ordered = np.sort(values)
    for additions in (expected, 1 - expected):
        forms = [("", original.exact(additions)), *original.rounded(additions)]
        if any(same_numbers(ordered, np.sort(form)) for _, form in forms):
            return NormCheck(
                name=key,
                finding=Finding.PERMUTED,
                expected=expected,
                added=additions,
                remark="the original's numbers in another order",
            )
    return None
