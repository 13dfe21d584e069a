"""Wrap vLLM, once a process, if it is a version that is known."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import vllm
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from gemma_fold.engines.vllm.build import prepare_model
from gemma_fold.engines.vllm.config import wrap_config
from gemma_fold.engines.vllm.load import wrap_load_model
from gemma_fold.errors import HostError

MINIMUM = (0, 26)
#: The last version this was run on. Later ones are used where they still have what is wrapped.
TESTED = "0.32"


def install() -> None:
    """Wrap vLLM's functions, once a process.

    Raises:
        HostError: this version of vLLM is not supported; nothing was wrapped.
    """
    problem = _problem()
    if problem:
        raise HostError(problem)
    wrap_config()
    loader_utils.record_metadata_for_reloading = _before(
        loader_utils.record_metadata_for_reloading, prepare_model
    )
    BaseModelLoader.load_model = wrap_load_model(BaseModelLoader.load_model)


def _problem() -> str:
    """Why this vLLM is not supported; empty if it is."""
    version = str(vllm.__version__)
    try:
        number = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        number = MINIMUM  # a build from source: what it has decides
    if number < MINIMUM:
        return (
            f"vLLM {version} is too old for folded checkpoints; "
            f"pip install --upgrade 'vllm>={MINIMUM[0]}.{MINIMUM[1]}'"
        )
    record = getattr(loader_utils, "record_metadata_for_reloading", None)
    load = getattr(BaseModelLoader, "load_model", None)
    if _parameters(record) != ["model"] or _parameters(load)[:3] != [
        "self",
        "vllm_config",
        "model_config",
    ]:
        return (
            f"vLLM {version} loads models in a way this gemma-fold does not know (it was tested "
            f"up to {TESTED}); upgrade gemma-fold, or install an earlier vLLM"
        )
    return ""


def _parameters(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _before(original: Callable[..., None], first: Callable[..., None]) -> Callable[..., None]:
    def record_metadata_for_reloading(model: Any) -> None:
        first(model)
        original(model)

    return record_metadata_for_reloading
