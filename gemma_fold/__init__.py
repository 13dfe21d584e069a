"""Fold zero-centred norm weights, gamma = 1 + w, once, offline and exactly.

    gemma_fold.inspect(source)          which norms of a checkpoint are zero-centred, by which rule
    gemma_fold.convert(source, out)     fold a checkpoint on disk
    gemma_fold.verify(folded)           check one that was folded
    gemma_fold.unfold(folded, out)      the very bytes it was made from
    gemma_fold.push(folded, repo_id)    upload it to the Hub, with a model card
    gemma_fold.check(file, against=a)   whether a converter got the +1 of every norm right
    gemma_fold.diff(a, b)               compare two checkpoints, or what two models answer
    gemma_fold.load(path_or_hub_id)     a folded checkpoint as a transformers model
    gemma_fold.fold_model(model)        the same for a model already in memory
    gemma_fold.unfold_model(model)      and back
    gemma_fold.rules                    lookup(model_type, tensor): what a norm's weight stores
    gemma_fold.ops                      operators that take the fp32 gamma

Importing this package imports neither torch nor numpy; a name does when it is first used. The last
four need torch (`pip install 'gemma-fold[torch]'`); `diff` does to compare outputs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gemma_fold._version import __version__
from gemma_fold.errors import (
    AlreadyFoldedError,
    CheckpointError,
    GemmaFoldError,
    HostError,
    NothingToFoldError,
    UnsupportedModelError,
    UsageError,
    missing_extra,
)

if TYPE_CHECKING:
    from gemma_fold import ops, rules
    from gemma_fold.checkpoint.progress import Progress
    from gemma_fold.commands.check import CheckReport, check
    from gemma_fold.commands.convert import ConversionReport, convert
    from gemma_fold.commands.inspect import Inspection, inspect
    from gemma_fold.commands.push import PushReport, push
    from gemma_fold.commands.unfold import unfold
    from gemma_fold.commands.verify import VerifyReport, verify
    from gemma_fold.compare.report.verdict import DiffLimits, DiffReport
    from gemma_fold.compare.run import DiffOptions, diff
    from gemma_fold.engines.transformers.plugin import load
    from gemma_fold.engines.transformers.weights import fold_model, unfold_model

#: Where each name that is imported on first use lives: as in the block above.
_HOME = {
    "CheckReport": "commands.check",
    "ConversionReport": "commands.convert",
    "DiffLimits": "compare.report.verdict",
    "DiffOptions": "compare.run",
    "DiffReport": "compare.report.verdict",
    "Inspection": "commands.inspect",
    "Progress": "checkpoint.progress",
    "PushReport": "commands.push",
    "VerifyReport": "commands.verify",
    "check": "commands.check",
    "convert": "commands.convert",
    "diff": "compare.run",
    "fold_model": "engines.transformers.weights",
    "inspect": "commands.inspect",
    "load": "engines.transformers.plugin",
    "ops": "",
    "push": "commands.push",
    "rules": "",
    "unfold": "commands.unfold",
    "unfold_model": "engines.transformers.weights",
    "verify": "commands.verify",
}

__all__ = [
    "AlreadyFoldedError",
    "CheckReport",
    "CheckpointError",
    "ConversionReport",
    "DiffLimits",
    "DiffOptions",
    "DiffReport",
    "GemmaFoldError",
    "HostError",
    "Inspection",
    "NothingToFoldError",
    "Progress",
    "PushReport",
    "UnsupportedModelError",
    "UsageError",
    "VerifyReport",
    "__version__",
    "check",
    "convert",
    "diff",
    "fold_model",
    "inspect",
    "load",
    "ops",
    "push",
    "rules",
    "unfold",
    "unfold_model",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    try:
        module = import_module(f"{__name__}.{home or name}")
    except ModuleNotFoundError as error:
        raise missing_extra(f"{__name__}.{name}", error) or error from None
    return getattr(module, name) if home else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
