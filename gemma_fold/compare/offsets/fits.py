"""What fits no pattern: one offset, one factor, a factor for each channel, or other numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gemma_fold.compare.offsets.expectation import NormRule
from gemma_fold.compare.offsets.finding import Finding, NormCheck, finding_of, pattern_remark
from gemma_fold.compare.offsets.original import Original
from gemma_fold.format.arithmetic import Float32

Float64 = npt.NDArray[np.float64]

#: A bfloat16 that was rounded twice is this far from its number, at most, relative to the number.
_TOLERANCE = 2.0**-8
#: Signs that a fit by signs needs on either side; fewer may agree by chance.
_SIGNS = 16
#: Factors that are closer together than this are no scales of a quantizer.
_TRAINED = 1.1


def by_fit(original: Original, values: Float32, expected: int) -> NormCheck:
    w, stored = original.w().astype(np.float64), values.astype(np.float64)
    usable = np.isfinite(w) & np.isfinite(stored)
    w, stored = w[usable], stored[usable]
    blank = NormCheck(name=original.rule.key, finding=Finding.CHANGED, expected=expected)
    if not w.size:
        return replace(blank, remark="no finite numbers")
    offset = float(np.median(stored - w))
    residual = float(np.abs(stored - w - offset).max())
    blank = replace(blank, offset=offset, residual=residual)
    for attempt in (_constant, _shifted, _factor, _channels):
        found = attempt(blank, original.rule, w, stored)
        if found is not None:
            return found
    moved = float(np.mean(stored - w)) - expected * original.rule.offset
    return replace(blank, remark=f"no fold of it; on average {moved:+.3g} from what belongs there")


def _constant(blank: NormCheck, rule: NormRule, w: Float64, stored: Float64) -> NormCheck | None:
    identity = 0.0 if rule.zero_centred and not blank.expected else 1.0
    if w.min() == w.max() or stored.min() != stored.max():
        return None
    if stored[0] in (identity, 1.0, 0.0):
        remark = f"all {stored[0]:g}: absorbed into the next matrices, or never loaded"
        return replace(blank, finding=Finding.ABSORBED, remark=remark)
    return None


def _shifted(blank: NormCheck, rule: NormRule, w: Float64, stored: Float64) -> NormCheck | None:
    assert blank.offset is not None
    error = np.abs(stored - w - blank.offset)
    if abs(blank.offset) < 1e-3 or np.any(error > _TOLERANCE * (np.abs(w) + abs(blank.offset))):
        return None
    times = blank.offset / rule.offset
    if abs(times - round(times)) < _TOLERANCE:
        added = round(times)
        finding = finding_of(blank.expected, added, "another")
        remark = pattern_remark(rule, blank.expected, added, "a dtype of its own")
        return replace(blank, finding=finding, added=added, rounding="another", remark=remark)
    remark = f"holds {blank.offset:g} + w"
    return replace(blank, finding=Finding.OFFSET, remark=remark)


def _factor(blank: NormCheck, rule: NormRule, w: Float64, stored: Float64) -> NormCheck | None:
    """One factor on what belongs there, on the gain, or on w."""
    offset = rule.offset if rule.zero_centred else 0.0
    base = w + offset * blank.expected
    for finding, what, one, two in (
        (Finding.SCALED, "the gain", w + offset, stored + offset * (1 - blank.expected)),
        (Finding.SCALED_W, "w", w, stored - offset * blank.expected),
        (Finding.SCALED, "the values", base, stored),
    ):
        square = float(np.dot(one, one))
        factor = float(np.dot(one, two)) / square if square else 1.0
        # Numbers near -offset lose their digits in a sum with it: what was stored sets the scale.
        if np.any(np.abs(two - factor * one) > _TOLERANCE * (np.abs(stored) + np.abs(two))):
            continue
        if abs(factor - 1.0) <= _TOLERANCE:
            remark = "within the rounding of 16 bits, by a rounding not known"
            added = blank.expected
            return replace(
                blank, finding=Finding.ROUNDED, added=added, rounding="another", remark=remark
            )
        return replace(blank, finding=finding, remark=f"{what} times {factor:.6g}")
    return None


def _channels(blank: NormCheck, rule: NormRule, w: Float64, stored: Float64) -> NormCheck | None:
    """A factor of its own for each channel, on w or on the gain, as AWQ and SmoothQuant put it."""
    if not rule.zero_centred:
        return None
    scaled_w = stored - rule.offset * blank.expected
    if _is_scaled(w, scaled_w):
        remark = "every sign of w is kept: channels were scaled as if w were the gain"
        return replace(blank, finding=Finding.SCALED_W, remark=remark)
    gain = w + rule.offset
    spreads = {
        added: spread
        for added in (blank.expected, 0, 1, 2)
        if (spread := _spread_of_ratio(gain, stored + rule.offset * (1 - added))) is not None
    }
    if not spreads:
        return None
    added = min(spreads, key=lambda n: spreads[n][1] / spreads[n][0])
    low, high = spreads[added]
    rivals = [most / least for n, (least, most) in spreads.items() if n != added]
    if high / low > 1e4 or any(rival < 2 * high / low for rival in rivals):
        return None
    if added == blank.expected and _range(gain, stored + rule.offset * (1 - added)) < _TRAINED:
        remark = f"gains times {low:.4g} to {high:.4g}, most near 1: trained further, it seems"
        return replace(blank, added=added, remark=remark)
    remark = f"channels of the gain times {low:.3g} to {high:.3g}"
    if added != blank.expected:
        remark += f", with the offset in it {added} times instead of {blank.expected}"
        return replace(
            blank, finding=finding_of(blank.expected, added, ""), added=added, remark=remark
        )
    return replace(blank, finding=Finding.SCALED, added=added, remark=remark)


def _is_scaled(w: Float64, other: Float64) -> bool:
    """Whether `other` is w times factors: all signs are w's, and not for being almost w."""
    if not np.array_equal(np.sign(w), np.sign(other)):
        return False
    if min(np.count_nonzero(w < 0), np.count_nonzero(w > 0)) < _SIGNS:
        return False
    return _range(w, other) >= _TRAINED


def _range(values: Float64, other: Float64) -> float:
    """How far apart the factors from one to the other are, but for the outermost tenths."""
    low, high = np.quantile(other[values != 0] / values[values != 0], (0.1, 0.9))
    return float(high / low) if low > 0 else np.inf


def _spread_of_ratio(gain: Float64, other: Float64) -> tuple[float, float] | None:
    """Smallest and largest of other / gain, where all of them are positive; gains of 0 must agree.

    A gain that is nearly 0 says nothing, since the sum that made it lost its digits.
    """
    telling = np.abs(gain) > 0.02
    if not telling.any():
        return None
    ratio = other[telling] / gain[telling]
    low, high = float(ratio.min()), float(ratio.max())
    return (low, high) if low > 0 and np.isfinite(high) else None
