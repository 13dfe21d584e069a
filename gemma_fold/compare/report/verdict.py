"""The verdict: whether two sides are the same, in one line, and why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gemma_fold.compare.outputs.results import Outputs
from gemma_fold.compare.report import evidence
from gemma_fold.compare.structure import Structure
from gemma_fold.compare.weights.norms import TensorClass
from gemma_fold.compare.weights.tensors import TensorDiff, Weights
from gemma_fold.text import cut


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether two sides are the same.

    Attributes:
        same: whether they are, and there is evidence of it.
        line: sums it up.
        reasons: the differences, none if the sides are the same or cannot be compared.
        comparable: whether there was evidence, of one or the other.
    """

    same: bool
    line: str
    reasons: tuple[str, ...]
    comparable: bool = True

    @property
    def exit_code(self) -> int:
        """What the command line returns: 0 the same, 1 different, 2 not comparable."""
        return 0 if self.same else 1 if self.comparable else 2


@dataclass(frozen=True, slots=True)
class SideInfo:
    """One side in a report; a server has a name and nothing else."""

    name: str
    folded: bool | None = None
    model_type: str | None = None
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class DiffLimits:
    """What the user tolerates: a mean KL in nats, and float32 ulps of a gain."""

    max_kl: float | None = None
    max_ulp: int = 0


@dataclass(frozen=True, slots=True)
class DiffReport:
    """Everything that `diff` found; parts that were not compared are None."""

    a: SideInfo
    b: SideInfo
    structure: Structure | None
    weights: Weights | None
    outputs: Outputs | None
    notes: tuple[str, ...]
    limits: DiffLimits
    verdict: Verdict
    environment: Mapping[str, str]


def judge(
    structure: Structure | None,
    weights: Weights | None,
    outputs: Outputs | None,
    limits: DiffLimits,
) -> Verdict:
    """Collect what differs beyond `limits`, and sum it up in one line."""
    reasons: list[str] = []
    if weights:
        reasons += _weight_reasons(weights, limits)
    if structure:
        reasons += _structure_reasons(structure, weights)
    if outputs:
        reasons += evidence.differences(outputs, limits.max_kl)
    if reasons:
        return Verdict(False, "differs: " + "; ".join(reasons[:3]), tuple(reasons))
    if outputs and (missing := list(evidence.gaps(outputs, limits.max_kl))):
        return Verdict(False, f"not comparable: {missing[0]}", (), comparable=False)
    return Verdict(True, "same: " + "; ".join(_assurances(structure, weights, outputs, limits)), ())


def _is_tolerated(tensor: TensorDiff, limits: DiffLimits) -> bool:
    if tensor.found.same:
        return True
    return tensor.norm is not None and tensor.norm.max_ulp <= limits.max_ulp


def _weight_reasons(weights: Weights, limits: DiffLimits) -> Iterator[str]:
    groups: dict[tuple[TensorClass, str, bool], list[TensorDiff]] = {}
    for tensor in (*weights.norms, *weights.others):
        if not _is_tolerated(tensor, limits):
            is_norm = tensor.norm is not None
            key = (tensor.found, tensor.remark if is_norm else "", is_norm)
            groups.setdefault(key, []).append(tensor)
    for (found, remark, is_norm), tensors in sorted(groups.items(), key=lambda g: -len(g[1])):
        kind = "norm" if is_norm else "other tensor"
        are = "s are" if len(tensors) != 1 else " is"
        text = f"{len(tensors)} {kind}{are} {_PHRASES.get(found, found.value)}"
        if not is_norm:
            first = tensors[0]
            remark = f"{first.name}: {first.remark or f'{first.changed:,} values'}"
        yield f"{text} ({remark})" + (_extent(tensors) if found is TensorClass.ROUNDED_FOLD else "")


def _extent(tensors: list[TensorDiff]) -> str:
    norms = [t.norm for t in tensors if t.norm]
    changed, elements = sum(n.changed for n in norms), sum(n.elements for n in norms)
    ulp = max(n.max_ulp for n in norms)
    return f": {changed:,} of {elements:,} weights differ, by up to {ulp:,} ulp"


def _structure_reasons(structure: Structure, weights: Weights | None) -> Iterator[str]:
    for side, names in (("A", structure.only_in_a), ("B", structure.only_in_b)):
        if names:
            yield f"{len(names)} tensor{'s'[: len(names) != 1]} only in {side} ({names[0]})"
    # The weight comparison reports these more precisely.
    reported = {t.name for t in (*weights.norms, *weights.others)} if weights else set()
    forms = [change for change in structure.forms if change.name not in reported]
    if forms:
        first = forms[0]
        yield (
            f"{len(forms)} tensor{'s'[: len(forms) != 1]} of another dtype or shape "
            f"({first.name}: {first.a} and {first.b})"
        )
    if structure.config:
        first = structure.config[0]
        count = len(structure.config)
        yield (
            f"{count} config key{'s'[: count != 1]} differ{'s'[: count == 1]} "
            f"({first.name}: {cut(first.a, 40)} and {cut(first.b, 40)})"
        )


def _assurances(
    structure: Structure | None,
    weights: Weights | None,
    outputs: Outputs | None,
    limits: DiffLimits,
) -> Iterator[str]:
    if weights:
        yield ", ".join(
            f"{count} {_ASSURED[found]}"
            for found, count in sorted(weights.counts.items(), key=lambda item: -item[1])
        )
        if weights.max_ulp:
            yield f"gammas within {weights.max_ulp:,} ulp, as allowed"
    elif structure:
        yield f"headers and configs of {structure.tensors} tensors agree; no weights were read"
    if outputs is None:
        return
    stats = outputs.stats
    what = "logits" if stats.vocabulary else f"top {stats.top_k}"
    if stats.identical:
        yield f"{what} identical at {stats.positions:,} positions"
    elif limits.max_kl is not None:
        yield f"mean KL {stats.mean_kl:.3g}, at most {limits.max_kl:g} as allowed"
    elif outputs.floor is not None:
        yield f"mean KL {stats.mean_kl:.3g}, within the noise floor of {outputs.floor.mean_kl:.3g}"


_PHRASES = {TensorClass.ROUNDED_FOLD: "folded with rounding", TensorClass.UNEXPECTED: "different"}
_ASSURED = {
    TensorClass.IDENTICAL: "tensors identical",
    TensorClass.EXACT_FOLD: "norms folded exactly",
    TensorClass.ROUNDED_FOLD: "norms folded with rounding",
    TensorClass.DOUBLE_FOLDED: "norms double-folded",
    TensorClass.NOT_FOLDED: "norms not folded",
    TensorClass.UNEXPECTED: "norms different",
}
