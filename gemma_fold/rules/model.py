"""The words of the rules: what a rule says of one tensor, and what `classify` says of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from gemma_fold.errors import (
    AlreadyFoldedError,
    CheckpointError,
    NothingToFoldError,
    UnsupportedModelError,
)

NormName = Literal["rms_norm", "layer_norm", "grouped_rms_norm"]
Rounding = Literal["float32", "storage"]


class Kind(Enum):
    """What a tensor is, as far as folding is concerned."""

    ZERO_CENTRED = "zero-centred"
    PLAIN = "plain"
    #: 1 + w, but not the gain of an RMSNorm or LayerNorm: left alone and reported.
    NOT_A_GAMMA = "not a gamma"
    OTHER = "other"


class Verdict(Enum):
    """Whether a checkpoint can be folded."""

    FOLDABLE = "foldable"
    ALREADY_FOLDED = "already folded"
    NOTHING_TO_FOLD = "nothing to fold"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class Fold:
    """The arithmetic that makes gamma of a stored weight: gamma = offset + w.

    norm: which norm gamma belongs to; `grouped_rms_norm` normalizes slices of the last dimension.
    offset: the number added to the stored weight.
    add_dtype: where the reference adds. `storage`: in the dtype of the weight as the model runs, so
    a folded norm rounds gamma to that dtype when it is used.
    mul_dtype: where the reference multiplies. `storage` rounds x_hat to x's dtype first.
    """

    norm: NormName = "rms_norm"
    offset: float = 1.0
    add_dtype: Rounding = "float32"
    mul_dtype: Rounding = "float32"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Why a rule is believed: code that was `executed`, or source that was `read`."""

    how: Literal["executed", "read"]
    source: str

    def __post_init__(self) -> None:
        if self.how not in ("executed", "read") or not self.source.strip():
            raise ValueError("evidence must say executed or read, and name its source")


@dataclass(frozen=True, slots=True)
class TensorRule:
    """The rule that decided one tensor.

    family: the `model_type` whose row decided. pattern: the full name with {i} for each index.
    fold: set for ZERO_CENTRED only. evidence: None for OTHER only. note: why, where it matters.
    condition: what the config has to say for zero-centred, where the answer depends on it.
    """

    kind: Kind
    family: str
    pattern: str
    fold: Fold | None = None
    evidence: Evidence | None = None
    note: str = ""
    condition: str = ""


@dataclass(frozen=True, slots=True)
class Classification:
    """What the rules say of a checkpoint, tensor by tensor.

    rules: one rule for every tensor given. missing: norms the config calls for that are not there.
    unclassified: tensors that look like norms and that no rule names. notes: remarks for people.
    decided: False where the model as a whole is refused or folded already, so that `rules` say
    nothing.
    """

    model_type: str
    verdict: Verdict
    reason: str
    rules: Mapping[str, TensorRule]
    missing: tuple[str, ...] = ()
    unclassified: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    decided: bool = True

    def zero_centred(self) -> dict[str, TensorRule]:
        """The tensors to fold, in the order they were given."""
        return {n: rule for n, rule in self.rules.items() if rule.kind is Kind.ZERO_CENTRED}

    def require_foldable(self) -> None:
        """Return if every norm is known and present.

        Raises AlreadyFoldedError, NothingToFoldError or UnsupportedModelError by the verdict, and
        CheckpointError where a norm that the config calls for is missing.
        """
        if self.verdict is Verdict.ALREADY_FOLDED:
            raise AlreadyFoldedError(self.reason)
        if self.verdict is Verdict.NOTHING_TO_FOLD:
            raise NothingToFoldError(self.reason)
        if self.verdict is Verdict.UNSUPPORTED:
            raise UnsupportedModelError(self.reason)
        if self.missing:
            raise CheckpointError(
                f"this {self.model_type} checkpoint lacks {shorten(self.missing)}, which its "
                "config.json calls for; get the complete checkpoint, or correct config.json"
            )


def shorten(names: Sequence[str], limit: int = 3) -> str:
    """`a, b, c and 5 more`."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
