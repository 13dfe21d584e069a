"""Which layers of a model have sandwiches, and the class that runs them fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from gemma_fold.engines.attach import code, pattern, prove
from gemma_fold.engines.attach.report import Missing
from gemma_fold.engines.attach.rewrite import rewrite
from gemma_fold.engines.transformers.norms import FoldedNorm

#: Fewer norms than two around each of two blocks are no sandwiches.
_FEWEST = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a layer decides how it is fused: its class, its norms and its dropouts, by name."""

    base: type[nn.Module]
    norms: tuple[str, ...]
    dropouts: tuple[str, ...]

    @property
    def sandwiches(self) -> int:
        return len(self.norms) // 2


@dataclass(frozen=True, slots=True)
class Plan:
    """How a layer is fused.

    forward: the changed function; None where nothing is fused. fused: how many sandwiches are.
    entry: the norm of what comes in, which the layer before may do.
    """

    forward: Callable[..., Any] | None = None
    fused: int = 0
    entry: str = ""
    missing: tuple[tuple[str, str], ...] = ()
    tree: Any = None


def shape_of(layer: nn.Module) -> Shape | None:
    """The shape of a layer with sandwiches; None for any other module."""
    norms = tuple(
        name for name, child in layer.named_children() if type(child) is FoldedNorm and child.is_rms
    )
    if len(norms) < _FEWEST:
        return None
    dropouts = tuple(name for name, x in layer.named_children() if type(x) is nn.Dropout)
    return Shape(type(layer), norms, dropouts)


def plan(shape: Shape) -> Plan:
    """How layers of this shape are fused, by the forward that their class has now."""
    return _plan(shape, shape.base.forward)


@cache
def _plan(shape: Shape, forward_now: Callable[..., Any]) -> Plan:
    try:
        read = code.read(forward_now)
        found = pattern.find(read.tree, shape.norms, shape.dropouts, read.function.__globals__)
        if not found.sites:
            return Plan(missing=found.missing)
        forward = code.rebuilt(read, rewrite(read.tree, found))
    except (code.Unreadable, pattern.Unfollowable) as error:
        return Plan(missing=(("", str(error)),))
    return Plan(forward, len(found.sites), found.entry, found.missing, read.tree)


def proved(layer: nn.Module, plan: Plan, fused: type[nn.Module], link: prove.Link) -> str:
    """Why a plan does not stand; empty where the fused class does what the layer's own does."""
    key = (type(layer), fused, prove.device_of(layer).type == "cuda")
    if key not in _proved:
        _proved[key] = prove.differs(layer, plan.tree, fused, link)
    return _proved[key]


def count_missing(found: list[tuple[Shape, Plan]]) -> tuple[Missing, ...]:
    """What the layers of a model miss, each kind once."""
    kinds: Counter[tuple[str, str, str]] = Counter()
    for shape, one in found:
        short = shape.sandwiches - one.fused
        reasons = one.missing or (("", "its forward has fewer sandwiches than its norms suggest"),)
        for norm, reason in reasons[: max(short, 0)]:
            kinds[f"{shape.base.__name__}.forward", norm, reason] += 1
    return tuple(Missing(*kind, layers) for kind, layers in kinds.items())


_proved: dict[tuple[type[nn.Module], type[nn.Module], bool], str] = {}
