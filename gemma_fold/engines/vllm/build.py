"""What happens to a model between its construction and its weights."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from vllm.logger import init_logger

from gemma_fold._version import __version__
from gemma_fold.engines.vllm.load import Loading, current_loading
from gemma_fold.engines.vllm.weights import name_gammas, stock_loader, zero_centred_norms

logger = init_logger("vllm.gemma_fold")


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
        weight.weight_loader = stock_loader(offset, tally)  # type: ignore[attr-defined]
        stock += 1
    if loading is not None and tally is not None:
        tally.stock = stock  # the outermost model comes last
        if stock:
            name_gammas(model, loading.tensors)


def _make_native(model: nn.Module, loading: Loading) -> None:
    # Imported here: stock mode needs no operators.
    from gemma_fold.engines.vllm.layers import Native, make_native
    from gemma_fold.engines.vllm.workspace import explain

    native = Native(loading.vllm_config, loading.workspace, loading.tally)
    norms = make_native(model, native)
    loading.tally.native += norms
    if norms:
        logger.info_once(
            "gemma-fold: native mode, %d norms with fp32 gamma; %s",
            norms,
            explain(loading.workspace),
        )
        _separate_compile_cache(loading.vllm_config)


def _separate_compile_cache(vllm_config: Any) -> None:
    """vLLM finds compiled graphs by its config, which must say that these are other graphs."""
    from gemma_fold.engines.vllm.qk import choose_qk_mode

    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config["gemma_fold"] = f"{__version__} {choose_qk_mode(vllm_config)}"
    else:  # a platform's own object, whose hash says nothing of this
        os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
