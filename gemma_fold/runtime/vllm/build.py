"""What happens to a model between its construction and its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from gemma_fold._version import __version__
from gemma_fold.runtime.vllm.load import Loading, current_loading
from gemma_fold.runtime.vllm.loaders import stock_loader, zero_centred_norms


def prepare_model(model: nn.Module) -> None:
    """Turn the norms of `model` native where the mode says so, and give the others their loaders.

    vLLM builds a language model inside a larger one with the same function, so a norm may come by
    twice.
    """
    loading = current_loading()
    if loading is not None and loading.mode == "native":
        _make_native(model, loading)
    tally = loading.tally if loading is not None else None
    stock = 0
    for _, _, weight, offset in zero_centred_norms(model):
        weight.weight_loader = stock_loader(offset, tally)
        stock += 1
    if tally is not None:
        tally.stock = stock  # the outermost model comes last


def _make_native(model: nn.Module, loading: Loading) -> None:
    from gemma_fold.runtime.vllm.native import Native, make_native

    norms = make_native(model, Native(loading.vllm_config, loading.workspace, loading.tally))
    loading.tally.native += norms
    if norms:
        _separate_compile_cache(loading.vllm_config)


def _separate_compile_cache(vllm_config: Any) -> None:
    """vLLM finds compiled graphs by its config, which must say that these are other graphs."""
    from gemma_fold.runtime.vllm.qk import choose_way

    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config["gemma_fold"] = f"{__version__} {choose_way(vllm_config)}"
    else:
        import os

        os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
