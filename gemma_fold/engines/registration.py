"""Plug-ins of inference engines: an engine goes on, whatever keeps gemma-fold from attaching."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

from gemma_fold.errors import GemmaFoldError, HostError, first_line
from gemma_fold.format.names import MODEL_TYPE

_seen: set[str] = set()


def register_once(engine: str, install: Callable[[], None], logger: str) -> None:
    """Run `install`, the first time in this process. Never raises.

    Where `install` does, one warning says why; the engine then serves what it always did, and a
    folded checkpoint is refused with the same words when its config is read.

    Args:
        engine: its name, for messages.
        install: attaches all of gemma-fold, or raises before it changed anything.
        logger: that the engine shows its users.
    """
    if engine in _seen:
        return
    _seen.add(engine)
    try:
        install()
    except Exception as error:
        problem = _explain(engine, error)
        logging.getLogger(logger).warning("gemma-fold is not attached: %s", problem)
        with suppress(Exception):  # without transformers, the engine reads no config either
            refuse_folded(problem)


def refuse_folded(problem: str) -> None:
    """Have every reader of a folded checkpoint's config raise HostError with `problem`."""
    from transformers import PreTrainedConfig

    # The innermost: a wrapper around it may have taken the mark off already.
    original = inspect.unwrap(PreTrainedConfig.__dict__["get_config_dict"].__func__)

    @wraps(original)
    def get_config_dict(cls: type, *args: Any, **kwargs: Any) -> Any:
        config, rest = original(cls, *args, **kwargs)
        if config.get("model_type") == MODEL_TYPE:
            raise HostError(problem)
        return config, rest

    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)


def _explain(engine: str, error: Exception) -> str:
    if isinstance(error, GemmaFoldError):
        return str(error)
    reason = f"{type(error).__name__}: {first_line(error)}"
    return (
        f"this {engine} is not one that gemma-fold can attach to ({reason}); "
        f"upgrade gemma-fold, or install a version of {engine} that its documentation names"
    )
