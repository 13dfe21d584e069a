"""Find out by running a module what it does with a 1-D parameter: w, 1 + w, or something else.

Nothing here looks at a name or at source: a module is called with the parameter at 0, 1, 2 and at
random numbers, and the outputs are compared.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

Verdict = Literal["zero_centred", "plain", "input_scaled", "unused", "other"]

#: How (1 + w) and the product may be rounded, in the words of `tests/data/norms.json`.
FP32 = "fp32 add, fp32 mul, cast"
STORAGE_ADD = "bf16 add, fp32 mul, cast"
STORAGE = "bf16 add, bf16 mul"
STORAGE_INPUT = "bf16 add (input scaled)"
#: Larger modules are blocks of a network, not norms.
_MOST_WEIGHTS = 2_000_000
_CLOSE = 1e-4


@dataclass(frozen=True, slots=True)
class Trial:
    """What a module was seen to do with its parameter.

    Attributes:
        verdict: zero_centred: y = x_hat * (offset + w); plain: y is proportional to w;
            input_scaled: y(x, w) = y(x * (1 + w), 0); unused: the same y for every w.
        offset: the number added to w, for zero_centred.
        norm: rms or layernorm, for zero_centred.
        rounding: how bfloat16 is rounded, for zero_centred and input_scaled; unknown where it is
            none of the ways above, or the offset is not 1, or there is a gate.
    """

    verdict: Verdict
    offset: float = 0.0
    norm: str = ""
    rounding: str = ""


def parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Its own 1-D parameters that may be gains: all but biases."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 1 and parameter.is_floating_point() and "bias" not in name:
            yield name, parameter


def built(cls: type[nn.Module], width: int = 16) -> nn.Module | None:
    """An instance of a class that needs no more than a width and an epsilon, else None."""
    try:
        required = [
            p.name
            for p in list(inspect.signature(cls.__init__).parameters.values())[1:]
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        arguments = {name: 1e-6 if "eps" in name else width for name in required}
        return cls(**arguments).eval() if arguments else None
    except Exception:  # whatever a constructor may raise: it wants something else
        return None


def tried(module: nn.Module, name: str) -> Trial | None:
    """What `module` does with its parameter `name`; None where it cannot be called alone."""
    if sum(p.numel() for p in module.parameters()) > _MOST_WEIGHTS:
        return None
    torch.manual_seed(0)
    copied = _on_cpu(module, name)
    parameter = getattr(copied, name)
    found = None
    for (shape, axis), gated in product(_shapes(parameter.numel()), (False, True)):
        try:
            trial = _verdict(_Call(copied, parameter, torch.randn(shape), axis, gated))
        except Exception:  # whatever a forward may raise: it wants another input
            continue
        found = found or trial
        if trial.verdict not in ("other", "unused"):  # or it took another axis for that of w
            return trial
    return found


def _on_cpu(module: nn.Module, name: str) -> nn.Module:
    """A float32 copy with a value everywhere: nothing but the parameter in question matters."""
    copied = copy.deepcopy(module)
    if any(p.is_meta for p in (*module.parameters(), *module.buffers())):
        copied = copied.to_empty(device="cpu")
    copied = copied.float().eval().requires_grad_(False)
    for key, tensor in (*copied.named_parameters(), *copied.named_buffers()):
        if tensor.is_floating_point() and key != name:
            tensor.fill_(0.0 if "bias" in key or "mean" in key else 1.0)
    return copied


def _shapes(width: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Inputs to try, each with the axis that the parameter goes along."""
    yield from (((2, 3, width), -1), ((6, width), -1), ((2, 3, 5, width), -1))
    yield from (((2, width, 5), 1), ((2, width, 5, 7), 1), ((2, width, 3, 5, 7), 1))


class _Call:
    """A module, its parameter and an input: the output for any value of the parameter."""

    def __init__(
        self, module: nn.Module, parameter: Tensor, x: Tensor, axis: int, gated: bool
    ) -> None:
        self.module, self.parameter, self.x = module, parameter, x
        self.axis, self.gated = axis, gated

    def __call__(self, w: Tensor | float, x: Tensor | None = None) -> Tensor:
        self.parameter.copy_(torch.as_tensor(w).expand_as(self.parameter))
        x = self.x if x is None else x
        torch.manual_seed(1)
        with torch.inference_mode():
            given = self.module(x.clone(), **self._more(x))
        found: Tensor = given[0] if isinstance(given, tuple | list) else given
        if found.shape != x.shape:
            raise ValueError("not elementwise")
        return found.clone()

    def _more(self, x: Tensor) -> dict[str, Tensor]:
        """What else the forward cannot do without; of a gated norm, the gate."""
        wanted = list(inspect.signature(self.module.forward).parameters.values())[1:]
        return {
            p.name: torch.ones_like(x)
            for p in wanted
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and (p.default is p.empty or (self.gated and p.name == "gate"))
        }

    def along(self, values: Tensor) -> Tensor:
        """One value for each weight, shaped to go with the input."""
        shape = [1] * self.x.dim()
        shape[self.axis] = -1
        return values.reshape(shape)


def _verdict(call: _Call) -> Trial:
    w = torch.rand_like(call.parameter) * 1.5  # not negative: an activation may follow
    zero, one, two, some = call(0.0), call(1.0), call(2.0), call(w)
    if not all(torch.isfinite(y).all() for y in (zero, one, two, some)):
        return Trial("other")
    if torch.equal(zero, one) and torch.equal(zero, some):
        return Trial("unused")
    step = one - zero
    if _close(two, zero + 2 * step) and _close(some, zero + call.along(w) * step):
        offset = _offset(zero, step)
        if offset is None:
            return Trial("other")
        if abs(offset) < 1e-4:
            return Trial("plain")
        norm = "layernorm" if _close(call(0.0, call.x + 3), zero) else "rms"
        return Trial("zero_centred", round(offset, 4), norm, _rounding(call))
    if _close(some, call(0.0, call.x * (1 + call.along(w)))):
        return Trial("input_scaled", rounding=_input_rounding(call))
    return Trial("other")


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=_CLOSE, atol=_CLOSE)


def _offset(zero: Tensor, step: Tensor) -> float | None:
    """The number c with zero = c * step; None where there is no such number."""
    c = float((zero * step).sum() / (step * step).sum())
    return c if _close(zero, c * step) else None


def _in_bf16(call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """Random bfloat16 weights, inputs, and what the module makes of them in bfloat16."""
    w = (torch.randn_like(call.parameter) * 0.3).bfloat16()
    x = torch.randn(64, *call.x.shape[1:]).bfloat16()
    module = copy.deepcopy(call.module).bfloat16()
    name = next(n for n, p in call.module.named_parameters() if p is call.parameter)
    return w, x, _Call(module, module.get_parameter(name), x, call.axis, call.gated)(w)


def _fewest_mismatches(got: Tensor, forms: dict[str, Tensor]) -> str:
    """The form that gives the bits that were got; one in a thousand may be a tie of x_hat's own."""
    mismatches = {name: int((form != got).sum()) for name, form in forms.items()}
    name = min(mismatches, key=lambda key: mismatches[key])
    return name if mismatches[name] <= got.numel() / 1000 else "unknown"


def _rounding(call: _Call) -> str:
    w, x, got = _in_bf16(call)
    wide = call.along(w.float())
    narrow = call.along(w + 1)
    x_hat = call(0.0, x.float())
    return _fewest_mismatches(
        got,
        {
            FP32: (x_hat * (1 + wide)).bfloat16(),
            STORAGE_ADD: (x_hat * narrow.float()).bfloat16(),
            STORAGE: x_hat.bfloat16() * narrow,
        },
    )


def _input_rounding(call: _Call) -> str:
    w, x, got = _in_bf16(call)
    scaled = (x.float() * call.along(w + 1).float()).bfloat16()  # rounded before it is normed
    return _fewest_mismatches(got, {STORAGE_INPUT: call(0.0, scaled.float()).bfloat16()})
