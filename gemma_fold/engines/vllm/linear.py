"""Linear layers of a native decoder: a few tokens stream the weight, more take vLLM's product.

A layer keeps its class, its weight and its loaders; only the method that multiplies is another. The
operator chooses by the number of tokens when it runs, so each CUDA graph holds what is faster for
its size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from copy import copy
from typing import Any

from torch import Tensor, nn
from vllm import envs
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from gemma_fold import ops
from gemma_fold.engines.mode import requested
from gemma_fold.ops.operators.linear import most_tokens

VARIABLE = "GEMMA_FOLD_LINEAR"
VALUES = ("streamed", "stock")


class StreamedLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """vLLM's method for bf16 weights, with :func:`gemma_fold.ops.linear` where there is no bias."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x`` [..., K] bf16 times the weight [N, K] of ``layer``: [..., N]."""
        if bias is None:
            return ops.linear(x, layer.weight)  # type: ignore[arg-type]
        return super().apply(layer, x, bias)  # type: ignore[no-any-return]


def unstreamed(vllm_config: Any) -> str:
    """Why no linear layer may stream its weight; empty if they may.

    Raises:
        UsageError: `GEMMA_FOLD_LINEAR` has an unknown value.
    """
    if requested(VARIABLE, VALUES) == "stock":
        return f"{VARIABLE}={os.environ[VARIABLE]}"
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT wants one product for any number of tokens"
    kernels = getattr(vllm_config, "kernel_config", None)
    backend = getattr(kernels, "linear_backend", "auto")
    return "" if backend == "auto" else f"--linear-backend={backend}"


def stream(layers: Iterable[nn.Module]) -> tuple[int, int]:
    """Have the linear layers in `layers` stream their weights where that was measured to be faster.

    Returns:
        How many do, and how many there are.
    """
    streamed = count = 0
    for layer in layers:
        for module in layer.modules():
            if not isinstance(module, LinearBase):
                continue
            count += 1
            method = module.quant_method
            weight = module._parameters.get("weight")
            if type(method) is not UnquantizedLinearMethod or weight is None:
                continue
            if most_tokens(weight):
                # Of another class, with all that vLLM's chose when it was made.
                module.quant_method = copy(method)
                module.quant_method.__class__ = StreamedLinearMethod
                streamed += 1
    return streamed, count
