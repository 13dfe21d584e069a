"""Which tensors are norms, and how many times each format should have added the offset to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_fold.compare.files.mlx_names import STORED_AS_GAMMA
from gemma_fold.compare.files.model import NormFile, by_canonical_name
from gemma_fold.errors import CheckpointError, UnsupportedModelError
from gemma_fold.rules import Kind, Verdict, classify
from gemma_fold.rules.model import shorten

#: What people call each format.
FORMAT_NAMES = {
    "safetensors": "safetensors in the layout of transformers",
    "folded": "folded by gemma-fold, format 1",
    "gguf": "GGUF",
    "mlx": "MLX",
    "tensors": "single tensors",
}


@dataclass(frozen=True, slots=True)
class NormRule:
    """A norm by its canonical name.

    Attributes:
        key: the canonical name.
        zero_centred: whether the original stores w, and its gain is offset + w.
        offset: what is added; 1 for plain norms, to which a converter may add it by mistake.
        family: the row of the rules that decided.
        is_folded: whether gemma-fold folds it; an input scaled by 1 + w is no gain.
    """

    key: str
    zero_centred: bool
    offset: float
    family: str
    is_folded: bool


@dataclass(frozen=True, slots=True)
class Norms:
    """The norms of a file: their rules by canonical name, and the file's own names of them."""

    rules: Mapping[str, NormRule]
    names: Mapping[str, str]
    model_type: str


def find_norms(file: NormFile) -> Norms:
    """The norms of a file by the rules of its own config.

    Raises:
        UnsupportedModelError: no rule says what its norms mean.
        CheckpointError: norms that its config calls for are missing.
    """
    found = classify(file.config, {name: (t.size,) for name, t in file.tensors.items()})
    if found.verdict is Verdict.UNSUPPORTED:
        raise UnsupportedModelError(f"{file.name}: {found.reason}")
    if found.verdict is Verdict.ALREADY_FOLDED:
        raise CheckpointError(f"{file.name}: {found.reason}")
    if found.missing and file.format in ("safetensors", "folded"):
        raise CheckpointError(
            f"{file.name} lacks {shorten(found.missing)}, which its config.json calls for; "
            "get the complete checkpoint"
        )
    kinds = {Kind.ZERO_CENTRED: True, Kind.NOT_A_GAMMA: True, Kind.PLAIN: False}
    ours = {n: rule for n, rule in found.rules.items() if rule.kind in kinds}
    names = by_canonical_name(ours)
    rules = {
        key: NormRule(
            key,
            kinds[ours[name].kind],
            fold.offset if (fold := ours[name].fold) else 1.0,
            ours[name].family,
            ours[name].kind is Kind.ZERO_CENTRED,
        )
        for key, name in names.items()
    }
    return Norms(rules, names, found.model_type)


def expected_additions(form: str, rule: NormRule, told: str | None = None) -> int:
    """How often the offset should be in what a file of a format holds: 0 for w, 1 for gamma.

    `told` is what the user says it holds, "w" or "gamma".
    """
    if not rule.zero_centred:
        return 0
    if told is not None:
        return 1 if told == "gamma" else 0
    if form == "mlx":
        return 1 if rule.family in STORED_AS_GAMMA else 0
    if form == "folded":
        return 1 if rule.is_folded else 0
    return 1 if form in ("gguf", "tensors") else 0


def may_round(form: str) -> bool:
    """Whether the format itself keeps gamma in the dtype of the weights."""
    return form == "mlx"


def expectation_line(form: str, rules: Mapping[str, NormRule], told: str | None) -> str:
    """In words, what zero-centred norms of the file should hold."""
    wanted = {expected_additions(form, r, told) for r in rules.values() if r.zero_centred}
    if not wanted:
        return "the norms of this family are plain: nothing is added to them anywhere"
    if wanted == {0}:
        return "its norms should hold w, as the original does: whatever reads it adds the offset"
    dtype = "the dtype of the weights" if may_round(form) else "float32"
    return f"its norms should hold gamma = offset + w in {dtype}: whatever reads it adds nothing"
