"""What happens to a model between its construction and its weights."""

from __future__ import annotations

from torch import nn

from gemma_fold.runtime.vllm.load import current_loading
from gemma_fold.runtime.vllm.loaders import stock_loader, zero_centred_norms


def prepare_model(model: nn.Module) -> None:
    """Give the zero-centred norms of `model` their loaders.

    vLLM builds a language model inside a larger one with the same function, so a norm may come by
    twice.
    """
    loading = current_loading()
    tally = loading.tally if loading else None
    norms = 0
    for _, _, weight, offset in zero_centred_norms(model):
        weight.weight_loader = stock_loader(offset, tally)
        norms += 1
    if tally is not None:
        tally.norms = norms  # the outermost model comes last
