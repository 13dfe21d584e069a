"""What became of one norm's gain: the classes of a fold, and how far the numbers are apart.

All of it compares gains, the number that multiplies x_hat: offset + w if a side stores w, the
stored gamma if it is folded. Only exact patterns count; there is no tolerance to tune.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from gemma_fold.format.arithmetic import Float32, decode, encode, fold
from gemma_fold.rules import Fold

#: Buckets of the ulp histogram: 0, 1, 2-3, 4-7, ..., 2^31 and more.
BUCKETS = 33


class TensorClass(Enum):
    """What a tensor of one side is to the same tensor of the other."""

    IDENTICAL = "identical"
    EXACT_FOLD = "exact fold"
    ROUNDED_FOLD = "rounded fold"
    DOUBLE_FOLDED = "double-folded"
    NOT_FOLDED = "not folded"
    UNEXPECTED = "unexpected"

    @property
    def same(self) -> bool:
        """Whether the model computes the same with either."""
        return self in (TensorClass.IDENTICAL, TensorClass.EXACT_FOLD)


@dataclass(frozen=True, slots=True)
class Spread:
    """Extent of a tensor's values.

    Attributes:
        min: the smallest.
        mean: of all but not-a-numbers.
        max: the largest.
    """

    min: float
    mean: float
    max: float


@dataclass(frozen=True, slots=True)
class StoredNorm:
    """One side's tensor as it is stored; `gamma` is whether it holds gamma, by the checkpoint."""

    raw: bytes
    dtype: str
    gamma: bool

    def gain(self, rule: Fold) -> Float32:
        """The float32 number that multiplies x_hat."""
        return decode(self.raw, self.dtype) if self.gamma else fold(self.raw, self.dtype, rule)


@dataclass(frozen=True, slots=True)
class NormStats:
    """One norm on both sides, as gains in float32.

    Attributes:
        elements: weights in the norm.
        changed: elements whose gain differs.
        w: the zero-centred weight of side A (gain minus offset).
        gamma_a, gamma_b: the gains.
        max_abs: largest difference of two gains.
        max_rel: the same relative to A's gain, over the elements whose gain is not 0.
        max_ulp: largest distance in float32 units in the last place (65,536 make a bf16 one).
        histogram: elements by ulp distance, in `BUCKETS` powers of two.
    """

    elements: int
    changed: int
    w: Spread
    gamma_a: Spread
    gamma_b: Spread
    max_abs: float
    max_rel: float
    max_ulp: int
    histogram: tuple[int, ...]


def compare_norm(a: StoredNorm, b: StoredNorm, rule: Fold) -> tuple[TensorClass, str, NormStats]:
    """Class, remark and numbers of one zero-centred norm; both sides have the same length."""
    gain_a, gain_b = a.gain(rule), b.gain(rule)
    stats = measure(gain_a, gain_b, rule)
    if (a.raw, a.dtype, a.gamma) == (b.raw, b.dtype, b.gamma):
        return TensorClass.IDENTICAL, "", stats
    if not stats.changed:
        found = TensorClass.EXACT_FOLD if a.gamma or b.gamma else TensorClass.IDENTICAL
        return found, _storage_remark(a, b), stats
    found, remark = _classify(a, b, gain_a, gain_b, rule)
    return found, remark, stats


def _storage_remark(a: StoredNorm, b: StoredNorm) -> str:
    for side in (a, b):
        if side.gamma and side.dtype != "F32":
            return f"stored as {side.dtype}, where every element happens to fit"
    return "" if a.gamma != b.gamma or a.dtype == b.dtype else f"{a.dtype} and {b.dtype}"


def _classify(
    a: StoredNorm, b: StoredNorm, gain_a: Float32, gain_b: Float32, rule: Fold
) -> tuple[TensorClass, str]:
    offset = np.float32(rule.offset)
    for who, culprit, right, wrong in _suspects(a, b, gain_a, gain_b):
        how = _rounding_of(right, wrong) if culprit.gamma else None
        if how is not None:
            return TensorClass.ROUNDED_FOLD, f"{who} holds gamma rounded to {how}"
        if _added_again(right, wrong, offset):
            return TensorClass.DOUBLE_FOLDED, _doubled_remark(who, culprit, rule)
        if culprit.gamma and _added_again(wrong, right, offset):
            return TensorClass.NOT_FOLDED, f"{who} is marked as folded but holds w"
    return TensorClass.UNEXPECTED, "another weight, no fold of it"


def _suspects(
    a: StoredNorm, b: StoredNorm, gain_a: Float32, gain_b: Float32
) -> Iterator[tuple[str, StoredNorm, Float32, Float32]]:
    """Who may have folded wrongly: name, tensor, the right gain, its own.

    A side that stores w is right by definition beside one that stores gamma. Of two of a kind,
    B is looked at first, because A is the reference.
    """
    if b.gamma or not a.gamma:
        yield "B", b, gain_a, gain_b
    if a.gamma or not b.gamma:
        yield "A", a, gain_b, gain_a


def _rounding_of(exact: Float32, values: Float32) -> str | None:
    """Which rounding makes `values` of `exact`; elements that are exact do not count against it."""
    for how, rounding in ROUNDINGS.items():
        rounded = rounding(exact)
        same = (values == exact) | (values == rounded) | (np.isnan(values) & np.isnan(exact))
        if same.all():
            return how
    return None


def _doubled_remark(who: str, culprit: StoredNorm, rule: Fold) -> str:
    if culprit.gamma:
        return f"{who} holds {2 * rule.offset:g} + w: the offset was added twice"
    return f"{who} holds gamma but is not marked as folded: loaders add the offset again"


def _added_again(low: Float32, high: Float32, offset: np.float32) -> bool:
    """Whether `high` is `low` + offset, each of the two exact or rounded to a 16-bit dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        for start in (low, *(rounding(low) for rounding in ROUNDINGS.values())):
            total = start + offset
            if same_numbers(high, total) or any(
                same_numbers(high, rounding(total)) for rounding in ROUNDINGS.values()
            ):
                return True
    return False


def _truncated(values: Float32) -> Float32:
    bits = np.ascontiguousarray(values).view(np.uint32)
    truncated: Float32 = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    return truncated


#: What values become in the 16-bit dtypes, by the name of each way.
ROUNDINGS: Mapping[str, Callable[[Float32], Float32]] = MappingProxyType(
    {
        "bf16": lambda values: decode(encode(values, "BF16"), "BF16"),
        "fp16": lambda values: decode(encode(values, "F16"), "F16"),
        "bf16, toward zero": _truncated,
    }
)


def same_numbers(a: Float32, b: Float32) -> bool:
    """Whether two tensors are equal, NaN to NaN."""
    return bool(np.array_equal(a, b, equal_nan=True))


def measure(gain_a: Float32, gain_b: Float32, rule: Fold) -> NormStats:
    """The numbers of two gains of equal length."""
    with np.errstate(all="ignore"):
        differs = (gain_a != gain_b) & ~(np.isnan(gain_a) & np.isnan(gain_b))
        error = np.abs(gain_b.astype(np.float64) - gain_a.astype(np.float64))[differs]
        scale = np.abs(gain_a.astype(np.float64))[differs]
        relative = error[scale > 0] / scale[scale > 0]
        w = gain_a - np.float32(rule.offset)
    distance = np.where(differs, ulp_distance(gain_a, gain_b), 0)
    return NormStats(
        elements=gain_a.size,
        changed=int(np.count_nonzero(differs)),
        w=_spread(w),
        gamma_a=_spread(gain_a),
        gamma_b=_spread(gain_b),
        max_abs=float(np.nanmax(error, initial=0.0)),
        max_rel=float(np.nanmax(relative, initial=0.0)),
        max_ulp=int(distance.max(initial=0)),
        histogram=_histogram(distance),
    )


def ulp_distance(a: Float32, b: Float32) -> npt.NDArray[np.int64]:
    """How many float32 numbers lie from `a` to `b`, element by element; -0.0 and 0.0 are one."""

    def rank(values: Float32) -> npt.NDArray[np.int64]:
        bits = np.ascontiguousarray(values).view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    distance: npt.NDArray[np.int64] = np.abs(rank(a) - rank(b))
    return distance


def _histogram(distance: npt.NDArray[np.int64]) -> tuple[int, ...]:
    # frexp's exponent of n is its number of binary digits: 0, 1, 2, 2, 3, ...
    bucket = np.minimum(np.frexp(distance.astype(np.float64))[1], BUCKETS - 1)
    return tuple(int(n) for n in np.bincount(bucket, minlength=BUCKETS))


def _spread(values: Float32) -> Spread:
    finite = values[~np.isnan(values)].astype(np.float64)
    if not finite.size:
        return Spread(float("nan"), float("nan"), float("nan"))
    with np.errstate(invalid="ignore"):
        return Spread(float(finite.min()), float(finite.mean()), float(finite.max()))
