"""Gemma 2 and 3 decoder layers that run their sandwich norms fused.

Between two blocks these layers norm the output, add the residual and norm the sum: three passes
that :func:`gemma_fold.ops.rms_norm_add_rms_norm` makes one. A layer is only touched where its own
forward is, statement for statement, the one the fused forward stands for; any other version of the
model keeps its forward and runs norm by norm, with the same results.

Two places in a layer have that pattern. The second spans two layers: the norm after the
feed-forward block, and the next layer's first norm. There the normed tensor waits for the next
layer, which takes it only if it is then called with the very hidden states it was made from.
"""

from __future__ import annotations

import importlib
import weakref
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gemma_fold import ops
from gemma_fold.engines.known_code import statements_digest
from gemma_fold.engines.transformers.hooks import Watched
from gemma_fold.engines.transformers.norms import FoldedNorm
from gemma_fold.ops import checks

#: sha256 of the statements that `SandwichLayer.forward` stands for, layout and comments aside.
_KNOWN_FORWARDS = frozenset({"19bb15ae20d3bae54efe83013247a9e1b46dc5755921125b706b92985cd3eca0"})
_MODELS = {
    "Gemma2DecoderLayer": "transformers.models.gemma2.modeling_gemma2",
    "Gemma3DecoderLayer": "transformers.models.gemma3.modeling_gemma3",
}
_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


class Handoff:
    """What a layer leaves for the next one; all layers of a list share it.

    Attributes:
        waiting: the next layer, the hidden states for it, and their first norm.
    """

    waiting: tuple[SandwichLayer, Tensor, Tensor] | None = None


class SandwichLayer(Watched):
    """The forward of a Gemma 2/3 decoder layer, over fused operators.

    Attributes:
        follower: the layer called next, as far as the model's list of layers tells.
        handoff: where the layer before leaves what it has for this one.
    """

    follower: weakref.ref[SandwichLayer] | None = None
    handoff: Handoff | None = None
    input_layernorm: FoldedNorm
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    pre_feedforward_layernorm: nn.Module
    mlp: nn.Module
    post_feedforward_layernorm: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """``hidden_states``: [batch, tokens, H]; the rest goes to the attention as it is."""
        x = self._take(hidden_states)
        if x is None:
            x = self.input_layernorm(hidden_states)
        x, _ = self.self_attn(
            hidden_states=x,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        x, residual = _sandwich(
            x, hidden_states, self.post_attention_layernorm, self.pre_feedforward_layernorm
        )
        x = self.mlp(x)
        follower = self._follower()
        if follower is None or self.handoff is None:
            return residual + self.post_feedforward_layernorm(x)  # type: ignore[no-any-return]
        x, output = _sandwich(
            x, residual, self.post_feedforward_layernorm, follower.input_layernorm
        )
        self.handoff.waiting = (follower, output, x)
        return output

    def _take(self, hidden_states: Tensor) -> Tensor | None:
        """The first norm of `hidden_states`, if the layer before made it."""
        if torch.compiler.is_compiling() or self.handoff is None:
            return None
        waiting, self.handoff.waiting = self.handoff.waiting, None
        if waiting is not None and waiting[0] is self and waiting[1] is hidden_states:
            return waiting[2]
        return None

    def _follower(self) -> SandwichLayer | None:
        """The next layer, if nothing can come between: no autograd, no hook, no change of device.

        Gradient checkpointing replays a layer alone, and a hook may change the hidden states
        between two layers in place, after they were normed.
        """
        if torch.compiler.is_compiling():
            return None  # it fuses this itself, and a way to another layer is a guard on every call
        follower = self.follower() if self.follower is not None else None
        if (
            follower is None
            or torch.is_grad_enabled()
            or not self.plain
            or not follower.plain
            or not follower.input_layernorm.plain
        ):
            return None
        return follower

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle must not drag the other layers along, and has other neighbours.
        state = self.__dict__.copy()
        state.pop("follower", None)
        state.pop("handoff", None)
        return state


def _sandwich(
    x: Tensor, residual: Tensor, post: nn.Module, pre: nn.Module
) -> tuple[Tensor, Tensor]:
    """``pre(total), total`` with ``total = residual + post(x)``; fused where both are plain."""
    if (
        isinstance(post, FoldedNorm)
        and isinstance(pre, FoldedNorm)
        and post.plain
        and pre.plain
        and x.dtype == residual.dtype
        and x.dtype in checks.ACTIVATION_DTYPES
        and x.shape[-1] <= checks.MAX_HIDDEN
    ):
        return ops.rms_norm_add_rms_norm(
            x, residual, post.gain.view(-1), pre.gain.view(-1), post.epsilon, pre.epsilon
        )
    total = residual + post(x)
    return pre(total), total


def fuse_layers(model: nn.Module) -> int:
    """Give every Gemma 2/3 decoder layer of a folded `model` the fused forward; how many."""
    fused = 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList):
            continue
        layers = [_fuse(layer) for layer in module if _is_known(layer)]
        handoff = Handoff()
        for layer in layers:
            layer.handoff = handoff
        for layer, follower in pairwise(layers):
            layer.follower = weakref.ref(follower)
        fused += len(layers)
    return fused


def split_layers(model: nn.Module) -> None:
    """Undo :func:`fuse_layers`."""
    for module in model.modules():
        if isinstance(module, SandwichLayer):
            for name in ("follower", "handoff", "plain"):
                module.__dict__.pop(name, None)
            module.__class__ = type(module).__bases__[1]


def _is_known(layer: nn.Module) -> bool:
    cls = type(layer)
    return (
        _MODELS.get(cls.__name__) == cls.__module__
        and all(type(getattr(layer, name, None)) is FoldedNorm for name in _NORMS)
        and statements_digest(cls.__dict__.get("forward")) in _KNOWN_FORWARDS
    )


def _fuse(layer: nn.Module) -> SandwichLayer:
    layer.__class__ = _fused_class(type(layer).__name__)
    assert isinstance(layer, SandwichLayer)
    layer.watch()
    return layer


@cache
def _fused_class(name: str) -> type[SandwichLayer]:
    # The name stays: device maps and sharding policies look layers up by it.
    base = getattr(importlib.import_module(_MODELS[name]), name)
    return type(name, (SandwichLayer, base), {"__module__": __name__, "__doc__": base.__doc__})


def __getattr__(name: str) -> type[SandwichLayer]:
    # Pickles name the fused classes, which exist once the model they extend is imported.
    if name in _MODELS:
        return _fused_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
