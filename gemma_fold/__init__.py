"""Fold zero-centred norm weights, gamma = 1 + w, once, offline and exactly.

    gemma_fold.load(path_or_hub_id)           a folded checkpoint as a transformers model
    gemma_fold.fold_model(model)              the same for a model already in memory
    gemma_fold.unfold_model(model)            and back
    gemma_fold.commands.convert.convert(source, out)   a checkpoint on disk; see also unfold, verify
    gemma_fold.ops                            kernels that take the fp32 gamma

Importing this package imports neither torch nor numpy; the functions above do when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gemma_fold._version import __version__
from gemma_fold.errors import GemmaFoldError

if TYPE_CHECKING:
    from gemma_fold.engines.transformers.fold_model import fold_model, unfold_model
    from gemma_fold.engines.transformers.plugin import load

_HOME = {
    "fold_model": "gemma_fold.engines.transformers.fold_model",
    "load": "gemma_fold.engines.transformers.plugin",
    "unfold_model": "gemma_fold.engines.transformers.fold_model",
}

__all__ = ["GemmaFoldError", "__version__", "fold_model", "load", "unfold_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
