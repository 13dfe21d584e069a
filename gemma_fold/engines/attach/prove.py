"""How the layers of a model are fused, and the proof: both forms run on the same random inputs.

The layers that run are stand-ins, so that this needs neither weights nor the arguments of a real
attention: the norms are real and have random gains, and every other part is a block that turns its
input into something else and notes what it was called with. What is compared is what the layers
return and what their blocks were given, over two layers in a row, in two dtypes, with and without
autograd. On a CPU every bit has to be the same.
"""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gemma_fold.engines.attach import code, pattern
from gemma_fold.engines.attach.flow import Unfollowable
from gemma_fold.engines.mode import Missing
from gemma_fold.engines.transformers.norms import FoldedNorm
from gemma_fold.errors import first_line

#: Two norms around each of two blocks: fewer are not sandwiches.
_FEWEST = 4

_INTERNAL = frozenset(vars(nn.Module())) | {"handoff", "follower", "plain"}
#: On a GPU the fused operator sums in another order: a few last bits of what it returns.
_TOLERANCE = {torch.bfloat16: 2.0**-5, torch.float32: 1e-4}

Link = Callable[[list[nn.Module]], None]
_proved: dict[tuple[type[nn.Module], type[nn.Module], bool], str] = {}


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

    Attributes:
        forward: the changed function; None if nothing is fused.
        fused: how many sandwiches are.
        entry: the norm of what comes in, which the layer before may do.
        missing: the norms of the other sandwiches, each with the reason.
        tree: of the forward, changed.
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
        forward = code.rebuilt(read, pattern.rewrite(read.tree, found))
    except (code.Unreadable, Unfollowable) as error:
        return Plan(missing=(("", str(error)),))
    entry = found.entry.name if found.entry is not None else ""
    return Plan(forward, len(found.sites), entry, found.missing, read.tree)


def proved(layer: nn.Module, plan: Plan, fused: type[nn.Module], link: Link) -> str:
    """Why a plan does not stand; empty if the fused class does what the layer's own does."""
    key = (type(layer), fused, device_of(layer).type == "cuda")
    if key not in _proved:
        _proved[key] = differs(layer, plan.tree, fused, link)
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


def differs(layer: nn.Module, tree: ast.FunctionDef, fused: type[nn.Module], link: Link) -> str:
    """How `fused` differs from the class of `layer`, in words; empty if it does not.

    Args:
        layer: one with its own forward.
        tree: that forward.
        fused: the class with the changed forward.
        link: makes fused layers neighbours.
    """
    base = type(layer)
    device = device_of(layer)
    for dtype, tolerance in _TOLERANCE.items():
        for grad in (False, True):
            expected = _tried(layer, tree, base, None, dtype, device, grad)
            if isinstance(expected, Exception) and not grad:
                return f"it cannot be tried on random inputs ({_reason(expected)})"
            found = _tried(layer, tree, fused, link, dtype, device, grad)
            if isinstance(found, Exception) and not isinstance(expected, Exception):
                return f"its fused form fails on random inputs ({_reason(found)})"
            # What changes its input in place has no gradients, fused or not.
            if not _agree(expected, found, None if device.type == "cpu" else tolerance):
                return "its fused form gives other values on random inputs"
    return ""


def _tried(*args: Any) -> Any:
    """What `_run` returns, or raises: whatever an engine's code does."""
    try:
        return _run(*args)
    except Exception as error:
        return error


def _run(
    layer: nn.Module,
    tree: ast.FunctionDef,
    cls: type[nn.Module],
    link: Link | None,
    dtype: torch.dtype,
    device: torch.device,
    grad: bool,
) -> list[Any]:
    """What two layers of `cls` in a row return, and what their blocks were called with."""
    generator = torch.Generator().manual_seed(0)
    hidden = _hidden(layer)
    notes: list[Any] = []
    outputs = _outputs(tree)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    layers = [_stand_in(layer, cls, outputs, notes, random, device) for _ in range(2)]
    if link is not None:
        link(layers)
    x = random(2, 3, hidden).to(device, dtype).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        state: Any = x * 1  # what a layer is given is made by another
        for one in layers:
            state = one(*_arguments(layer, state, lambda: random(2, 3, hidden).to(device, dtype)))
            notes.append(state)
            state = state[0] if isinstance(state, tuple) else state
        if grad:
            state.float().square().sum().backward()
            notes.append(x.grad)
    return notes


def _arguments(layer: nn.Module, state: Tensor, other: Callable[[], Tensor]) -> list[Any]:
    """The hidden states, and something for every other argument that has no default."""
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[1:]
    arguments: list[Any] = [state]
    for parameter in parameters[1:]:
        positional = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if not positional or parameter.default is not parameter.empty:
            break
        arguments.append((other(), other()))
    return arguments


class _Block(nn.Module):
    """Stands for an attention or a feed-forward block."""

    def __init__(self, real: nn.Module, factor: float, outputs: int, notes: list[Any]) -> None:
        super().__init__()
        self.__dict__.update(real=real, factor=factor, outputs=outputs, notes=notes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        self.notes.append([x.detach().clone() for x in tensors])
        y = (tensors[0] * self.factor).roll(1, -1)
        return (y, *[None] * (self.outputs - 1)) if self.outputs else y

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)


def _stand_in(
    layer: nn.Module,
    cls: type[nn.Module],
    outputs: dict[str, int],
    notes: list[Any],
    random: Callable[..., Tensor],
    device: torch.device,
) -> nn.Module:
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    new.__dict__.update({k: v for k, v in vars(layer).items() if k not in _INTERNAL})
    for number, (name, child) in enumerate(layer._modules.items()):
        if isinstance(child, FoldedNorm):
            new._modules[name] = _norm(child, random, device)
        elif child is None or isinstance(child, nn.Dropout):
            new._modules[name] = None if child is None else nn.Dropout(child.p)
        else:
            new._modules[name] = _Block(child, 0.5 + number, outputs.get(name, 0), notes)
    for name, parameter in (*layer._parameters.items(), *layer._buffers.items()):
        value = (
            random(*parameter.shape).to(device, parameter.dtype) if parameter is not None else None
        )
        new.__dict__[name] = value
    return new.eval()


def _norm(norm: FoldedNorm, random: Callable[..., Tensor], device: torch.device) -> FoldedNorm:
    new = FoldedNorm.__new__(FoldedNorm)
    nn.Module.__init__(new)
    new.__dict__.update({k: v for k, v in vars(norm).items() if k not in _INTERNAL})
    new._parameters[norm.gain_name] = nn.Parameter(1 + random(norm.gain.numel(), 1).to(device))
    new.watch()
    return new


def _outputs(tree: ast.FunctionDef) -> dict[str, int]:
    """How many values the parts of a layer return, by attribute, as far as they are unpacked."""
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        target, function = node.targets[0], node.value.func
        if isinstance(target, ast.Tuple) and isinstance(function, ast.Attribute):
            found[function.attr] = len(target.elts)
    return found


def _hidden(layer: nn.Module) -> int:
    return next(c.gain.shape[0] for c in layer.children() if isinstance(c, FoldedNorm))


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer is tried: its own GPU, or the CPU."""
    norm = next(child for child in layer.children() if isinstance(child, FoldedNorm))
    return norm.gain.device if norm.gain.device.type == "cuda" else torch.device("cpu")


def _agree(one: Any, two: Any, tolerance: float | None) -> bool:
    if isinstance(one, Tensor):
        if not isinstance(two, Tensor) or (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        if tolerance is None:
            return torch.equal(one, two)
        return bool((one - two).abs().max() <= tolerance * one.abs().max())
    if isinstance(one, (list, tuple)):
        return (
            isinstance(two, (list, tuple))
            and len(one) == len(two)
            and all(_agree(*pair, tolerance) for pair in zip(one, two, strict=True))
        )
    if isinstance(one, Exception):
        return type(one) is type(two)
    return one is two or bool(one == two)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error, 120)}"
