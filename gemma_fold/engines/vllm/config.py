"""The original config for every reader in vLLM, with a mark that the checkpoint is folded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import PreTrainedConfig

from gemma_fold.engines.checks import native_config
from gemma_fold.errors import CheckpointError
from gemma_fold.format.names import MODEL_TYPE

#: Attribute of the config that holds the folded checkpoint's own block: format, tensors, version.
MARK = MODEL_TYPE


def wrap_config() -> None:
    """Wrap `get_config_dict`."""
    # What is innermost: the transformers integration may have wrapped it before, without the mark.
    original = inspect.unwrap(PreTrainedConfig.__dict__["get_config_dict"].__func__)
    PreTrainedConfig.get_config_dict = classmethod(_wrapped(original))


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def get_config_dict(cls: type, pretrained: Any, **kwargs: Any) -> Any:
        config, rest = original(cls, pretrained, **kwargs)
        if config.get("model_type") == MODEL_TYPE:
            config = _marked(config, str(pretrained))
        return config, rest

    return get_config_dict


def _marked(config: dict[str, Any], where: str) -> dict[str, Any]:
    native = native_config(config, where)
    block = config[MODEL_TYPE]
    if not block.get("tensor_lock", True):
        raise CheckpointError(
            f"{where} was folded without the tensor lock, so vLLM could not tell its gammas from "
            "raw weights; fold the original again without --no-tensor-lock"
        )
    return {**native, MARK: block}


def folded_block(config: Any) -> dict[str, Any] | None:
    """The mark on a model's config, or None where the checkpoint is not folded."""
    block = getattr(config, MARK, None)
    return block if isinstance(block, dict) else None
