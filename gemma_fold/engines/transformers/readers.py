"""Programs that load a model through transformers and read its norm weights, to add 1 themselves.

CTranslate2's converter is one. It gets the original's weights: what it loads is unfolded before it
looks. It is found when it asks for a config, which it does before it loads, so that it may be
imported before or after the integration is installed, and is not imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from gemma_fold.engines.transformers.norms import FoldedNorm
from gemma_fold.engines.transformers.weights import unfold_model

_CTRANSLATE2 = "ctranslate2.converters.transformers"


def unfold_for_readers() -> None:
    """Wrap what is imported by now, once."""
    converter = getattr(sys.modules.get(_CTRANSLATE2), "TransformersConverter", None)
    load_model = getattr(converter, "load_model", None)
    if load_model is not None and not getattr(load_model, "unfolds", False):
        converter.load_model = _unfolding(load_model)  # type: ignore[union-attr]


def _unfolding(load_model: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load_model)
    def load_unfolded(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)
        folded = any(isinstance(module, FoldedNorm) for module in model.modules())
        return unfold_model(model) if folded else model

    load_unfolded.unfolds = True  # type: ignore[attr-defined]
    return load_unfolded
