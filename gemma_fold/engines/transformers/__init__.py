"""Hugging Face transformers loads, runs and saves folded checkpoints.

    install()              everything in transformers takes folded checkpoints from then on
    load(path_or_hub_id)   a folded checkpoint as a transformers model; installs
    fold_model(model)      the same for a model already in memory; installs
    unfold_model(model)    and back
    shard_norms(model)     FSDP2 for its float32 gammas, before fully_shard

Importing this package changes nothing in transformers, and does not import it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_fold.engines.transformers.fsdp import shard_norms
    from gemma_fold.engines.transformers.plugin import install, load
    from gemma_fold.engines.transformers.weights import fold_model, unfold_model

_HOME = {
    "fold_model": "gemma_fold.engines.transformers.weights",
    "install": "gemma_fold.engines.transformers.plugin",
    "load": "gemma_fold.engines.transformers.plugin",
    "shard_norms": "gemma_fold.engines.transformers.fsdp",
    "unfold_model": "gemma_fold.engines.transformers.weights",
}

__all__ = ["fold_model", "install", "load", "shard_norms", "unfold_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
