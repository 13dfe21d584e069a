"""The table: every model family that gemma-fold knows."""

from __future__ import annotations

from gemma_fold.rules.families.elsewhere import ELSEWHERE
from gemma_fold.rules.families.gemma import GEMMA
from gemma_fold.rules.families.layernorm import LAYERNORM
from gemma_fold.rules.families.minimax import MINIMAX
from gemma_fold.rules.families.muse import MUSE
from gemma_fold.rules.families.plain import PLAIN
from gemma_fold.rules.families.qwen import QWEN
from gemma_fold.rules.families.refused import REFUSED
from gemma_fold.rules.families.step import STEP
from gemma_fold.rules.row import Family

TABLE: tuple[Family, ...] = (
    *GEMMA,
    *QWEN,
    *MUSE,
    *MINIMAX,
    *STEP,
    *LAYERNORM,
    *ELSEWHERE,
    *REFUSED,
    *PLAIN,
)


def _index(keys: str) -> dict[str, tuple[Family, ...]]:
    """Rows by model type or architecture; two rows with one key are two layouts of one family."""
    index: dict[str, tuple[Family, ...]] = {}
    for family in TABLE:
        for key in getattr(family, keys):
            index[key] = (*index.get(key, ()), family)
    return index


BY_MODEL_TYPE = _index("model_types")
BY_ARCHITECTURE = _index("architectures")
