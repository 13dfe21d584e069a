"""Which mode a model is loaded in."""

from __future__ import annotations

import os
from typing import Any, Literal

from gemma_fold.errors import UsageError

#: native: fp32 gamma and gemma-fold's operators. stock: vLLM's own norms, with w = gamma - 1.
Mode = Literal["native", "stock"]

VARIABLE = "GEMMA_FOLD"


def choose_mode(vllm_config: Any, model_config: Any, *, folded: bool) -> Mode:
    """The mode for a model about to be built.

    `GEMMA_FOLD` decides where it is set, for originals too. Otherwise a folded checkpoint is native
    on CUDA and everything else is stock. Draft models are always stock.

    Raises UsageError for another value of the variable.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "native", "stock"):
        raise UsageError(f"{VARIABLE}={wanted} is no mode; use native or stock")
    if model_config is not vllm_config.model_config:
        return "stock"  # a draft
    if wanted:
        return "native" if wanted == "native" else "stock"
    return "native" if folded and _on_cuda() else "stock"


def _on_cuda() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())
