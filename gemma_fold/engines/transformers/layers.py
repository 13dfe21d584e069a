"""Decoder layers that run their sandwich norms fused.

Between two blocks Gemma 2, 3 and their like norm the output, add the residual and norm the sum:
three passes that :func:`gemma_fold.ops.rms_norm_add_rms_norm` makes one. A layer's own forward is
kept, with those three expressions changed wherever `attach` finds them, and only after the changed
function was run beside the original. A layer where they are not found keeps its forward and runs
norm by norm, with the same results.

Two places in a layer have that pattern. The second spans two layers: the norm after the
feed-forward block, and the next layer's first norm. There the normed tensor waits for the next
layer, which takes it only if it is then called with the very hidden states it was made from.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gemma_fold import ops
from gemma_fold.engines.attach.prove import (
    Plan,
    Shape,
    count_missing,
    plan,
    proved,
    shape_of,
)
from gemma_fold.engines.mode import Missing
from gemma_fold.engines.transformers.norms import FoldedNorm, Watched
from gemma_fold.ops import checks


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a layer leaves for the next one: the hidden states for it, and their first norm.

    Attributes:
        version: counts changes in place of the hidden states; None in inference mode, which does
            not.
    """

    layer: SandwichLayer
    hidden_states: Tensor
    normed: Tensor
    version: int | None


class Handoff:
    """Where layers leave it; all layers of a list share one."""

    waiting: Waiting | None = None


class SandwichLayer(Watched):
    """What the changed forward of a layer calls.

    Attributes:
        shape: how it was fused.
        entry: the attribute of the norm that `_entered` runs, or empty.
        follower: the layer called next, as far as the model's list of layers shows.
        handoff: where the layer before leaves what it has for this one.
    """

    shape: Shape
    entry: str
    follower: weakref.ref[SandwichLayer] | None = None
    handoff: Handoff | None = None

    def _entered(self, hidden_states: Tensor, name: str) -> Tensor:
        """The first norm of `hidden_states`, made by the layer before or here."""
        if not torch.compiler.is_compiling() and self.handoff is not None:
            waiting, self.handoff.waiting = self.handoff.waiting, None
            if (
                waiting is not None
                and waiting.layer is self
                and waiting.hidden_states is hidden_states
                and waiting.version == _version(hidden_states)
            ):
                return waiting.normed
        return self._modules[name](hidden_states)  # type: ignore[misc, no-any-return]

    def _fused(
        self, one: Tensor, two: Tensor, left: bool, post: str, pre: str, dropout: str
    ) -> list[Tensor]:
        """``[total, pre(total)]`` with ``total = one + two``, one of them through `post` first.

        `left`: it is the first. It goes through the dropout too, if there is one.
        """
        return _sandwich(
            one, two, left, self._modules[post], self._modules[pre], self._modules.get(dropout)
        )

    def _left(self, one: Tensor, two: Tensor, left: bool, post: str, dropout: str) -> Tensor:
        """The sum alone, which the layer returns; its norm is left for the next layer."""
        follower, norm = self._follower()
        first, between = self._modules[post], self._modules.get(dropout)
        if follower is None or self.handoff is None:
            return _total(one, two, left, first, between)
        total, normed = _sandwich(one, two, left, first, norm, between)
        self.handoff.waiting = Waiting(follower, total, normed, _version(total))
        return total

    def _follower(self) -> tuple[SandwichLayer | None, nn.Module | None]:
        """The next layer and its first norm, if nothing can come between: no autograd, no hook.

        Gradient checkpointing replays a layer alone, and a hook may change the hidden states
        between two layers in place, after they were normed.
        """
        if torch.compiler.is_compiling():
            # it fuses this itself, and a way to another layer is a guard on every call
            return None, None
        follower = self.follower() if self.follower is not None else None
        if follower is None or torch.is_grad_enabled() or not self.plain or not follower.plain:
            return None, None
        norm = follower._modules.get(follower.entry)
        return (follower, norm) if _is_plain(norm) else (None, None)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle must not drag the other layers along, and has other neighbours.
        state = self.__dict__.copy()
        state.pop("follower", None)
        state.pop("handoff", None)
        return state

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made when it is needed, so no pickle can name it.
        return _restored, (self.shape,), self.__getstate__()


def _is_plain(norm: nn.Module | None) -> bool:
    return isinstance(norm, FoldedNorm) and norm.plain and norm.is_rms


def _is_identity(module: nn.Module | None) -> bool:
    """Whether a dropout does nothing."""
    if module is None:
        return True
    return (
        type(module) is nn.Dropout
        and not (module.training and module.p)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _total(
    one: Tensor, two: Tensor, left: bool, post: nn.Module | None, dropout: nn.Module | None
) -> Tensor:
    x = post(one if left else two)  # type: ignore[misc]
    if dropout is not None:
        x = dropout(x)
    return x + two if left else one + x  # type: ignore[no-any-return]


def _sandwich(
    one: Tensor,
    two: Tensor,
    left: bool,
    post: nn.Module | None,
    pre: nn.Module | None,
    dropout: nn.Module | None,
) -> list[Tensor]:
    """Fused if all of it is plain."""
    x, residual = (one, two) if left else (two, one)
    if (
        isinstance(post, FoldedNorm)
        and isinstance(pre, FoldedNorm)
        and _is_plain(post)
        and _is_plain(pre)
        and _is_identity(dropout)
        and x.dtype == residual.dtype
        and x.shape == residual.shape
        and checks.supports(x)
    ):
        normed, total = ops.rms_norm_add_rms_norm(
            x, residual, post.gain.view(-1), pre.gain.view(-1), post.epsilon, pre.epsilon
        )
        return [total, normed]
    total = _total(one, two, left, post, dropout)
    return [total, pre(total)]  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Fusion:
    """What :func:`fuse_layers` did: `fused` of `sandwiches`, and why not the rest."""

    fused: int = 0
    sandwiches: int = 0
    missing: tuple[Missing, ...] = ()


def fuse_layers(model: nn.Module) -> Fusion:
    """Give every layer of a folded `model` that has sandwiches its fused forward."""
    found: list[tuple[Shape, Plan]] = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList):
            continue
        planned = [(layer, shape) for layer in module if (shape := shape_of(layer)) is not None]
        plans = [_proved_plan(layer, shape) for layer, shape in planned]
        found += [(shape, one) for (_, shape), one in zip(planned, plans, strict=True)]
        fused = [
            _fuse(layer, shape)
            for (layer, shape), one in zip(planned, plans, strict=True)
            if one.forward is not None
        ]
        _link([layer for layer in fused if isinstance(layer, SandwichLayer)])
    return Fusion(
        sum(one.fused for _, one in found),
        sum(shape.sandwiches for shape, _ in found),
        count_missing(found),
    )


def split_layers(model: nn.Module) -> None:
    """Undo :func:`fuse_layers`."""
    for module in model.modules():
        if isinstance(module, SandwichLayer):
            for name in ("follower", "handoff", "plain"):
                module.__dict__.pop(name, None)
            module.__class__ = module.shape.base  # type: ignore[assignment]


def _proved_plan(layer: nn.Module, shape: Shape) -> Plan:
    one = plan(shape)
    if "forward" in layer.__dict__:
        return Plan(missing=(("", "it was replaced on the layer"),) * shape.sandwiches)
    if one.forward is None:
        return one
    problem = proved(layer, one, _fused_class(shape), _link)
    return replace(one, forward=None, fused=0, missing=(("", problem),)) if problem else one


def _link(layers: Any) -> None:
    handoff = Handoff()
    for layer in layers:
        layer.handoff = handoff
    for layer, follower in pairwise(layers):
        layer.follower = weakref.ref(follower)


def _fuse(layer: nn.Module, shape: Shape) -> nn.Module:
    layer.__class__ = _fused_class(shape)
    assert isinstance(layer, SandwichLayer)
    layer.watch()
    return layer


def _fused_class(shape: Shape) -> type[nn.Module]:
    return _class_of(shape, plan(shape))


@cache
def _class_of(shape: Shape, plan: Plan) -> type[nn.Module]:
    # The name stays: device maps and sharding policies look layers up by it.
    base = shape.base
    names = {"__module__": __name__, "__doc__": base.__doc__, "shape": shape, "entry": plan.entry}
    return type(base.__name__, (SandwichLayer, base), names | {"forward": plan.forward})


def _restored(shape: Shape) -> nn.Module:
    """The layer of a copy or a pickle, before its state."""
    fused = plan(shape).forward is not None
    cls = _fused_class(shape) if fused else shape.base
    return cls.__new__(cls)
