"""Which mode a model is loaded in."""

from __future__ import annotations

from typing import Any, Literal

from gemma_fold.runtime.attach.setting import VARIABLE, wanted

__all__ = ["VARIABLE", "Mode", "choose_mode"]

#: native: fp32 gamma and gemma-fold's operators. stock: vLLM's own norms, with w = gamma - 1.
Mode = Literal["native", "stock"]


def choose_mode(vllm_config: Any, model_config: Any, *, folded: bool) -> Mode:
    """The mode for a model about to be built.

    `GEMMA_FOLD` decides where it is set, for originals too. Otherwise a folded checkpoint is native
    on CUDA and everything else is stock. Draft models are always stock.

    Raises UsageError for another value of the variable.
    """
    value = wanted()
    if model_config is not vllm_config.model_config:
        return "stock"  # a draft
    if value:
        return "stock" if value == "stock" else "native"
    return "native" if folded and _on_cuda() else "stock"


def _on_cuda() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())
