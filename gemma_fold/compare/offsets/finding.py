"""The words for what became of a norm, and one norm's result."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from gemma_fold.compare.offsets.expectation import NormRule


class Finding(Enum):
    """What a norm of a file is to the same norm of the original."""

    SAME = "same"
    FOLDED = "folded exactly"
    ROUNDED = "rounded"
    NOT_FOLDED = "not folded"
    UNASKED = "folded, but what reads it adds again"
    DOUBLED = "offset added twice"
    OFFSET = "another offset"
    PERMUTED = "permuted"
    OTHER_NORM = "another norm's"
    ABSORBED = "identity"
    SCALED = "scaled"
    SCALED_W = "w scaled, not 1 + w"
    CHANGED = "other values"
    ABSENT = "absent"
    SHAPE = "another length"
    UNREADABLE = "unreadable dtype"


@dataclass(frozen=True, slots=True, kw_only=True)
class NormCheck:
    """One norm.

    Attributes:
        name: what transformers calls it, without wrappers.
        stored: its name in the file; "" where it is absent.
        finding: what it is to the original's.
        right: whether the file should hold just this.
        expected: how often the file should have added the offset.
        added: how often it did, where that shows.
        dtype: of the file's tensor.
        rounding: which rounding makes its values of the exact ones, "" for none.
        elements: weights in the norm.
        changed: elements that are not what the file should hold.
        max_ulp: largest error of those gains, in float32 ulp; 65,536 make one of bfloat16.
        offset: fitted, for `OFFSET` and `CHANGED`: the median of what was added to w.
        residual: largest distance from that.
        of: the norm it really is, for `OTHER_NORM`.
        remark: in words.
    """

    name: str
    stored: str = ""
    finding: Finding
    right: bool = False
    expected: int
    added: int | None = None
    dtype: str = ""
    rounding: str = ""
    elements: int = 0
    changed: int = 0
    max_ulp: int = 0
    offset: float | None = None
    residual: float | None = None
    of: str = ""
    remark: str = ""


def finding_of(expected: int, added: int, rounding: str) -> Finding:
    if added == expected:
        if rounding:
            return Finding.ROUNDED
        return Finding.FOLDED if expected else Finding.SAME
    if added < expected:
        return Finding.NOT_FOLDED
    return Finding.UNASKED if (expected, added) == (0, 1) else Finding.DOUBLED


def held(added: int, offset: float = 1.0) -> str:
    """What w is with the offset in it so many times, in words."""
    return f"{added * offset:g} + w" if added else "w"


def pattern_remark(rule: NormRule, expected: int, added: int, rounding: str) -> str:
    how = f", rounded to {rounding}" if rounding else ""
    if added == expected:
        return f"rounded to {rounding}" if rounding else ""
    holds, wanted = held(added, rule.offset), held(expected, rule.offset)
    if not rule.zero_centred:
        holds, wanted = f"{added * rule.offset:+g} on its gamma", "its gamma as it is"
    return f"holds {holds}{how} instead of {wanted}"
