"""Which tensors of a checkpoint are zero-centred norms: one table, one matcher, no guessing.

lookup(model_type, tensor_name, config)   what one tensor is: a `Rule`
classify(config, shapes)                  what every tensor of a checkpoint is
TABLE, CLASSES                            the rows themselves
"""

from gemma_fold.rules.answer import Rule, lookup
from gemma_fold.rules.classes import CLASSES, NORM_CLASSES, NormClass
from gemma_fold.rules.matcher import classify
from gemma_fold.rules.model import (
    Classification,
    Evidence,
    Fold,
    Kind,
    TensorRule,
    Verdict,
)
from gemma_fold.rules.table import TABLE

__all__ = [
    "CLASSES",
    "NORM_CLASSES",
    "TABLE",
    "Classification",
    "Evidence",
    "Fold",
    "Kind",
    "NormClass",
    "Rule",
    "TensorRule",
    "Verdict",
    "classify",
    "lookup",
]
