"""Linear layers of a native decoder: a few tokens stream the weight, more take torch's product.

A layer keeps its class, its weight and its loaders; only the method that multiplies is another. The
operator chooses by the number of tokens when it runs, so each CUDA graph holds what is faster for
its size. In a feed-forward block with GELU the first product and GELU are one operator.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from copy import copy
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from vllm import envs
from vllm.model_executor.layers.activation import GeluAndMul
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


class GeluLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """The gates and what they scale, with GELU: :func:`gemma_fold.ops.gelu_linear`."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x`` [..., K] bf16 and the weight [2 I, K] of ``layer``: [..., I]."""
        assert bias is None
        return ops.gelu_linear(x, layer.weight)  # type: ignore[arg-type]


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


def stream(layers: Iterable[nn.Module], *, adapters: bool) -> tuple[int, int]:
    """Have the linear layers in `layers` stream their weights where that was measured to be faster.

    Args:
        layers: of a decoder, built and perhaps not loaded yet.
        adapters: LoRA may add to what a layer returns, so GELU stays where it is.

    Returns:
        How many do, and how many there are.
    """
    streamed = count = 0
    for layer in layers:
        if not adapters:
            _join_gelu(getattr(layer, "mlp", None))
        for module in layer.modules():
            if not isinstance(module, LinearBase):
                continue
            count += 1
            if isinstance(module.quant_method, GeluLinearMethod):
                streamed += 1
            elif _most_tokens(module):
                _replace_method(module, StreamedLinearMethod)
                streamed += 1
    return streamed, count


def _most_tokens(module: Any, *, gated: bool = False) -> int:
    """For which `module` may stream its weight; 0 if its method is not vLLM's for plain weights."""
    weight = module._parameters.get("weight")
    if type(module.quant_method) is not UnquantizedLinearMethod or weight is None:
        return 0
    return most_tokens(weight, gated=gated)


def _replace_method(module: Any, cls: type[UnquantizedLinearMethod]) -> None:
    """Of another class, with all that vLLM's chose when it was made."""
    module.quant_method = copy(module.quant_method)
    module.quant_method.__class__ = cls


def _join_gelu(block: Any) -> None:
    """Give the first product of a feed-forward `block` its GELU, if that is what `block` does."""
    if not isinstance(block, nn.Module) or not _is_gated(type(block)):
        return
    first: Any = block.gate_up_proj
    activation: Any = block.act_fn
    if (
        not isinstance(first, LinearBase)
        or type(activation) is not GeluAndMul
        or activation.approximate != "tanh"
        or getattr(first, "bias", None) is not None
        or getattr(first, "gather_output", False)
        or not _most_tokens(first, gated=True)
    ):
        return
    _replace_method(first, GeluLinearMethod)
    block.act_fn = nn.Identity()


def _is_gated(cls: type) -> bool:
    """Whether a block is down_proj(act_fn(gate_up_proj(x))): tried on things that allow no more."""
    x = object()
    parts = SimpleNamespace(
        gate_up_proj=lambda value: (("gate_up_proj", value), None),
        act_fn=lambda value: ("act_fn", value),
        down_proj=lambda value: (("down_proj", value), None),
    )
    try:
        result = cls.forward(parts, x)  # type: ignore[attr-defined]
    except Exception:
        return False
    return bool(result == ("down_proj", ("act_fn", ("gate_up_proj", x))))
