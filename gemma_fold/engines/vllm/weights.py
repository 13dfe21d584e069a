"""Weight loaders that take a gamma, `[H, 1]`, or a raw w, `[H]`, and never add or subtract twice.

vLLM calls the `weight_loader` of a parameter on the first load, on reloads and on live updates, and
copies it to the parameters that it builds for a reload. Each loader here makes exactly one copy of
the parameter's own shape, as vLLM's accounting of reloads and its sparse updates require.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from gemma_fold.engines.weights import fold, is_gamma, original_weight, unfold
from gemma_fold.format.manifest import FoldedTensor
from gemma_fold.rules import NORM_CLASSES

Loader = Callable[[Tensor, Tensor], None]
#: Attribute of a loaded gamma: its `FoldedTensor`.
_SOURCE = "gemma_fold_source"

#: Norms of vLLM that add to their weight on every forward, by class name; the offset, or the
#: attribute that holds it.
_CLASSES: dict[str, float | str] = {
    "GemmaRMSNorm": 1.0,
    "GroupedGemmaRMSNorm": 1.0,
    "MiniMAXGemmaRMSNorm": 1.0,
    "NemotronLayerNorm1P": 1.0,
    "MuseGlimmerRMSNorm": "weight_offset",
}


class Tally:
    """How many zero-centred norms a model has, and what they took while it was loaded.

    Also how many of its linear layers stream their weight in native mode, and the mode of each
    layer's q and k norms.
    """

    def __init__(self) -> None:
        self.native = 0
        self.stock = 0
        self.gammas = 0
        self.raw = 0
        self.linear = 0
        self.streamed = 0
        self.qk_modes: list[str] = []

    @property
    def norms(self) -> int:
        return self.native + self.stock


def zero_centred_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter, float]]:
    """Every norm of `model` that adds to its weight: name, module, the weight, what it adds."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 1:  # [H, 1] is a gamma already
            continue
        offset = _offset(module)
        if offset:
            yield name, module, weight, offset


def _offset(module: nn.Module) -> float:
    for cls in type(module).__mro__:
        if cls.__module__.startswith("transformers."):  # vLLM can run a model of transformers
            rule = NORM_CLASSES.get(cls.__name__)
            if rule is not None:
                return rule.offset
        if cls.__module__.startswith("vllm.") and cls.__name__ in _CLASSES:
            offset = _CLASSES[cls.__name__]
            return float(getattr(module, offset, 0.0) if isinstance(offset, str) else offset)
    return 0.0


def name_gammas(model: nn.Module, tensors: Mapping[str, FoldedTensor]) -> None:
    """Have `load_weights` of `model` hand each gamma on with what the manifest says of it.

    A weight loader is given a tensor, not its name; it finds the original's w by this.
    """
    load_weights: Callable[..., Any] | None = getattr(model, "load_weights", None)
    if load_weights is None:
        return

    def named(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name in tensors:
                setattr(tensor, _SOURCE, tensors[name])
            yield name, tensor

    @wraps(load_weights)
    def load_named(weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        return load_weights(named(weights), *args, **kwargs)

    # On the instance: the class serves models that are not folded, too.
    model.__dict__["load_weights"] = load_named


def stock_loader(offset: float, tally: Tally | None) -> Loader:
    """For a parameter that holds w: a gamma is unfolded into it."""

    def load_zero_centred_weight(param: Tensor, loaded_weight: Tensor) -> None:
        gamma = _is_gamma(param, loaded_weight, tally)
        param.data.copy_(_unfolded(loaded_weight, offset) if gamma else loaded_weight)

    return load_zero_centred_weight


def _unfolded(gamma: Tensor, offset: float) -> Tensor:
    """fp32 w [H] of ``gamma``, [H, 1]: the original's own, if the manifest came along."""
    source: FoldedTensor | None = getattr(gamma, _SOURCE, None)
    if source is None:
        return unfold(gamma.view(-1), offset, torch.float32)
    return original_weight(gamma.view(-1), source)


def gamma_loader(tally: Tally | None) -> Loader:
    """For a parameter that holds gamma, fp32 [H, 1]: a raw w is folded into it."""

    def load_gamma(param: Tensor, loaded_weight: Tensor) -> None:
        gamma = _is_gamma(param, loaded_weight, tally)
        param.data.copy_(loaded_weight if gamma else fold(loaded_weight, 1.0)[:, None])

    return load_gamma


def _is_gamma(param: Tensor, loaded: Tensor, tally: Tally | None) -> bool:
    gamma = is_gamma(loaded, param.shape[0])
    if tally is not None and not param.is_meta:  # vLLM counts elements first
        tally.gammas += gamma
        tally.raw += not gamma
    return gamma
