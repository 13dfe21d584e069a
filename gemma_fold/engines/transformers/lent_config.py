"""The original config of a folded checkpoint, before a model was loaded with it.

Programs that copy tensors from files and a config from transformers (mergekit does) would write the
original's config beside gammas, without the config lock. So that config is marked when it is handed
out and does not go to disk; a model that is loaded or saved takes the mark off its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import PreTrainedConfig

from gemma_fold.errors import UsageError

#: The attribute that holds the name of the checkpoint. It is not serialized.
_MARK = "_gemma_fold_source"


def lend(config: dict[str, Any], source: str) -> dict[str, Any]:
    """`config` with the mark, which the config object made from it keeps as it is copied."""
    return {**config, _MARK: source}


def release(config: Any) -> None:
    """Take the mark off the config of a model."""
    vars(config).pop(_MARK, None)


def keep_lent_configs_off_disk() -> None:
    """Have configs that are marked refuse to be written."""
    PreTrainedConfig.to_dict = _without_mark(PreTrainedConfig.to_dict)
    PreTrainedConfig.to_json_file = _refusing(PreTrainedConfig.to_json_file)


def _without_mark(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @wraps(original)
    def to_dict(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = original(self, *args, **kwargs)
        found.pop(_MARK, None)
        return found

    return to_dict


def _refusing(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def to_json_file(self: Any, *args: Any, **kwargs: Any) -> None:
        source = vars(self).get(_MARK)
        if source is not None:
            raise UsageError(
                f"{source} is a folded checkpoint, whose original config must not be saved without "
                f"the original's weights; `gemma-fold unfold {source}` and start from the result"
            )
        original(self, *args, **kwargs)

    return to_json_file
