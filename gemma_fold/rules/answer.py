"""`lookup`: what one tensor of a model type is, for programs that convert checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gemma_fold.rules.families import plain
from gemma_fold.rules.matcher import classify
from gemma_fold.rules.model import Classification, Evidence, Fold, Kind

#: Plain model types that have a model of any family inside.
WRAPPERS = frozenset(plain.WRAPPERS.split())

RuleKind = Literal["zero_centred", "layernorm1p", "plain", "input_scaled", "not_a_norm", "unknown"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What is known of one tensor.

    Attributes:
        kind: `zero_centred`: the stored weight w of an RMSNorm whose gain is `fold.offset` + w.
            `layernorm1p`: the same of a LayerNorm, whose bias, if any, is stored as it is used.
            `plain`: the stored weight is the gain itself. `input_scaled`: 1 + w multiplies the
            input of the norm, so that it is not a gain. `not_a_norm`: the name is not that of a
            norm's weight. `unknown`: no rule answers, and nothing should be changed; see `note`.
        model_type: whose row decided; in a wrapper that of the model inside.
        condition: what the config has to say for zero-centred, where the answer depends on it.
        fold: the arithmetic of the gain, for `zero_centred` and `layernorm1p` only.
        evidence: file and line of released code, and whether it was executed or read; None for
            `not_a_norm` and `unknown`.
        note: why, where the name misleads; for `unknown`, what is missing.
    """

    kind: RuleKind
    model_type: str
    condition: str = ""
    fold: Fold | None = None
    evidence: Evidence | None = None
    note: str = ""


def lookup(model_type: str, tensor_name: str, config: Mapping[str, Any] | None = None) -> Rule:
    """Say what the tensor `tensor_name` of a checkpoint of this `model_type` is.

    Args:
        model_type: as `config.json` says it.
        tensor_name: the full name on disk. `{i}` may stand for the number of a layer.
        config: the parsed `config.json`. Without it, switches are as where the config is silent,
            and norms of a wrapper of any model are `unknown`: they may be those of that model.

    Returns:
        A rule, always: what no row answers for is `unknown`. For a whole checkpoint use `classify`,
        which sees in addition what is missing and which of two layouts it is in.
    """
    whole = dict(config or {}) | {"model_type": model_type}
    rule = _rule(classify(whole, {tensor_name: (8,)}), tensor_name)
    if config is None and rule.kind == "plain" and rule.model_type in WRAPPERS:
        return Rule("unknown", rule.model_type, note="decided by the model inside; pass the config")
    return rule


def _rule(found: Classification, name: str) -> Rule:
    rule = found.rules[name]
    if not found.decided or name in found.unclassified:
        return Rule("unknown", found.model_type, note=found.reason)
    return Rule(
        kind=kind_of(rule.kind, rule.fold),
        model_type=rule.family,
        condition=rule.condition,
        fold=rule.fold,
        evidence=rule.evidence,
        note=rule.note,
    )


def kind_of(kind: Kind, fold: Fold | None) -> RuleKind:
    """The word for it outside of this package."""
    if kind is Kind.ZERO_CENTRED:
        return "layernorm1p" if fold and fold.norm == "layer_norm" else "zero_centred"
    if kind is Kind.PLAIN:
        return "plain"
    return "input_scaled" if kind is Kind.NOT_A_GAMMA else "not_a_norm"
