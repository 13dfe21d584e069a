"""The whole file in one sentence: what its norms are, how many, and what that does to the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gemma_fold.compare.offsets.evidence import Evidence
from gemma_fold.compare.offsets.finding import Finding, NormCheck, held


@dataclass(frozen=True, slots=True)
class CheckVerdict:
    """The answer: `right` is None where nothing tells; `line` says it in words."""

    right: bool | None
    line: str

    @property
    def exit_code(self) -> int:
        """0 for right, 1 for wrong, 2 where nothing tells."""
        return 2 if self.right is None else 0 if self.right else 1


def judge_norms(norms: Sequence[NormCheck]) -> CheckVerdict:
    """Of a file beside its original."""
    wrong = [norm for norm in norms if not norm.right]
    if not norms:
        return CheckVerdict(None, "cannot tell: the two have no norm in common")
    if not wrong:
        return CheckVerdict(True, _right_line(norms))
    counts = Counter(_key(norm) for norm in wrong)
    clauses = [
        _CLAUSES[finding]([n for n in wrong if _key(n) == (finding, expected)])
        for (finding, expected), _ in counts.most_common()
    ]
    shown = clauses[:3] + ([f"and {len(clauses) - 3} more findings"] if len(clauses) > 3 else [])
    only_rounded = all(n.finding is Finding.ROUNDED for n in wrong)
    word = "rounded" if only_rounded else "wrong"
    whole = _many(len(norms), "norm")
    if len(counts) == 1 and len(wrong) == len(norms):
        return CheckVerdict(False, f"{word}: all {whole} {clauses[0].partition(' ')[2]}")
    return CheckVerdict(False, f"{word}: of {whole}, " + "; ".join(shown))


def judge_evidence(found: Evidence | None) -> CheckVerdict:
    """Of a file alone."""
    if found is None:
        return CheckVerdict(
            None, "cannot tell: no zero-centred norms of offset 1; give --against ORIGINAL"
        )
    if found.right is None:
        return CheckVerdict(
            None, "cannot tell from the file alone; give the original with --against"
        )
    sure = "its bits show it" if found.sure == "bits" else "a guess from statistics"
    holds = "" if found.added is None else held(found.added)
    if found.rounding:
        holds = f"{holds or 'gamma'} rounded as gamma in {found.rounding}"
    verb = (
        "looks right: holds"
        if found.right
        else f"looks wrong: should hold {held(found.expected)}, but holds"
    )
    return CheckVerdict(found.right, f"{verb} {holds} ({sure})")


def _key(norm: NormCheck) -> tuple[Finding, int]:
    return norm.finding, norm.expected


def _right_line(norms: Sequence[NormCheck]) -> str:
    parts = []
    for finding, what in (
        (Finding.FOLDED, "gamma = offset + w, exactly"),
        (Finding.SAME, "what the original does, exactly"),
    ):
        count = sum(n.finding is finding for n in norms)
        if count:
            parts.append(f"{_holds(count)} {what}")
    rounded = [n for n in norms if n.finding is Finding.ROUNDED]
    if rounded:
        parts.append(
            f"{_holds(len(rounded))} gamma in the dtype of the weights, as this format does, which "
            f"changes {_changed(rounded)}"
        )
    scaled = sum(n.finding is Finding.SCALED for n in norms)
    if scaled:
        parts.append(
            f"{_many(scaled, 'norm')} {'was' if scaled == 1 else 'were'} scaled by channel with "
            "the offset taken into account, as quantizers do where they scale the next matrices "
            "too, which are not read here"
        )
    return "right: " + "; ".join(parts)


def _holds(count: int) -> str:
    return f"{_many(count, 'norm')} {'holds' if count == 1 else 'hold'}"


def _changed(norms: Sequence[NormCheck]) -> str:
    changed, elements = sum(n.changed for n in norms), sum(n.elements for n in norms)
    ulp = max(n.max_ulp for n in norms)
    unit = f"{ulp / 65536:g} ulp of bfloat16" if ulp >= 32768 else f"{ulp:,} ulp of float32"
    return f"{changed:,} of {elements:,} weights, by up to {unit}"


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s'[: count != 1]}"


def _plain(words: str) -> Callable[[Sequence[NormCheck]], str]:
    return lambda norms: f"{len(norms):,} {words}"


def _rounded(norms: Sequence[NormCheck]) -> str:
    how = ", ".join(sorted({n.rounding for n in norms}))
    return f"{len(norms):,} have the offset right but were rounded ({how}): {_changed(norms)}"


def _added(norms: Sequence[NormCheck]) -> str:
    if norms[0].expected:
        return f"{len(norms):,} had the offset added twice or more, so the gain is too large by it"
    return f"{len(norms):,} hold a gamma to which the offset was added, and its reader adds it too"


_CLAUSES: dict[Finding, Callable[[Sequence[NormCheck]], str]] = {
    Finding.ROUNDED: _rounded,
    Finding.NOT_FOLDED: _plain("lack the offset: what reads them takes w for the gain"),
    Finding.UNASKED: _plain(
        "have the offset in them where it does not belong, so the gain is too large by it"
    ),
    Finding.DOUBLED: _added,
    Finding.OFFSET: _plain("hold w plus another number"),
    Finding.PERMUTED: _plain("hold their own numbers in another order"),
    Finding.OTHER_NORM: _plain("hold another norm"),
    Finding.ABSORBED: _plain("are the identity"),
    Finding.SCALED: _plain("are scaled, with the offset taken into account"),
    Finding.SCALED_W: _plain("were scaled as if w were the gain"),
    Finding.CHANGED: _plain("hold other values, trained or of another model"),
    Finding.ABSENT: _plain("are not in the file"),
    Finding.SHAPE: _plain("have another length"),
    Finding.UNREADABLE: _plain("are stored in a dtype that no norm should have"),
}
