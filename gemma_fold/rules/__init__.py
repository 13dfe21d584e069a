"""Which tensors of a checkpoint are zero-centred norms: one table, one matcher, no guessing."""

from gemma_fold.rules.matcher import classify
from gemma_fold.rules.model import (
    Classification,
    Evidence,
    Fold,
    Kind,
    TensorRule,
    Verdict,
)

__all__ = ["Classification", "Evidence", "Fold", "Kind", "TensorRule", "Verdict", "classify"]
