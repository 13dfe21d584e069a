"""The table: every model family that gemma-fold knows."""

from __future__ import annotations

from gemma_fold.rules.gemma import GEMMA
from gemma_fold.rules.qwen import QWEN
from gemma_fold.rules.row import Family

TABLE: tuple[Family, ...] = (*GEMMA, *QWEN)


def _index(keys: str) -> dict[str, tuple[Family, ...]]:
    """Rows by model type or architecture; two rows with one key are two layouts of one family."""
    index: dict[str, tuple[Family, ...]] = {}
    for family in TABLE:
        for key in getattr(family, keys):
            index[key] = (*index.get(key, ()), family)
    return index


BY_MODEL_TYPE = _index("model_types")
BY_ARCHITECTURE = _index("architectures")
