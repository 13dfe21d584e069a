"""Whether a layer of vLLM or SGLang only passes on what one norm hands to the next.

The layers in question keep the residual beside the hidden states, so that a norm can add it:

    x = post(block(...)); x, residual = pre(x, residual)

`Methods` are the functions of a class by name, of a loaded class or compiled from its source.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gemma_fold.engines.attach.trace import (
    Open,
    Refused,
    Sealed,
    Self,
    Ways,
    arguments,
    name_of,
    sealed_in,
)

Methods = Mapping[str, Callable[..., Any]]
Layout = Literal["sandwich", "add_norm"]
#: After which part of a layer which norm comes, with the norm that it hands its output to.
_SANDWICH = {
    "self_attn": ("post_attention_layernorm", "pre_feedforward_layernorm"),
    "mlp": ("post_feedforward_layernorm", "input_layernorm"),
}
_ADD_NORM = {"self_attn": "post_attention_layernorm", "mlp": "input_layernorm"}


def methods_of(cls: type) -> dict[str, Callable[..., Any]]:
    """The functions of a loaded class."""
    own = [base for base in cls.__mro__ if base not in nn.Module.__mro__]
    return {
        name: value
        for base in reversed(own)
        for name, value in vars(base).items()
        if inspect.isfunction(value) and not name.startswith("__")
    }


def methods_in(file: Path, cls: str) -> dict[str, Callable[..., Any]]:
    """The functions of a class in a source file, without importing it; empty if there is none."""
    found: dict[str, Any] = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("__"):
                    method.decorator_list, method.returns = [], None
                    for argument in ast.walk(method.args):
                        if isinstance(argument, ast.arg):
                            argument.annotation = None
                    names: dict[str, Any] = {}
                    module = ast.Module([method], [])
                    exec(compile(module, str(file), "exec"), {}, names)
                    found |= names
    return found


def layer_problem(methods: Methods, layout: Layout, real: Any = None) -> str:
    """Why a decoder layer does not only pass on what is handed to it; empty if it does."""
    return _problem(lambda ways: _layer(methods, layout, ways, real))


def model_problem(methods: Methods, real: Any = None) -> str:
    """Why a model does not only pass what a layer returns to the next, and to the last norm."""
    return _problem(lambda ways: _model(methods, ways, real))


def block_problem(methods: Methods, projection: str, real: Any = None) -> str:
    """Why a block does more with the output of its last `projection` than return it."""
    return _problem(lambda ways: _block(methods, projection, ways, real))


def _problem(run: Callable[[Ways], None]) -> str:
    ways = Ways()
    try:
        ways.all(lambda: run(ways))
    except Refused as error:
        return str(error)
    except Exception as error:  # what an engine's code does with stand-ins
        return f"it cannot be followed ({type(error).__name__}: {error})".partition("\n")[0][:160]
    return ""


class _Norms:
    """The norms of a layer, and which of them was given what was meant for it."""

    def __init__(self, layout: Layout, ways: Ways) -> None:
        self._ways = ways
        self.taken: list[str] = []
        self.first: dict[str, str] = {}  # a norm that hands on -> the block before it
        self.second: dict[str, str] = {}  # a norm that completes -> what made its input
        for block, norms in (_SANDWICH if layout == "sandwich" else _ADD_NORM).items():
            if isinstance(norms, tuple):
                self.first[norms[0]] = block
                self.second[norms[1]] = norms[0]
            else:
                self.second[norms] = block

    def part(self, name: str) -> Callable[..., Any]:
        def norm(x: Any, residual: Any = None) -> Any:
            if sealed_in(residual):
                raise Refused(f"the output of {name_of(residual)} becomes the residual")
            if residual is None:
                if name not in self.first:
                    if type(x) is Sealed:
                        raise Refused(f"{name} gets the output of {name_of(x)} without residual")
                    return Open(self._ways)
                if name_of(x) != self.first[name]:
                    raise Refused(f"{name} is not given what {self.first[name]} returns")
                return Sealed(name)
            if name in self.first or name_of(x) != self.second[name]:
                raise Refused(f"{name} is not given what comes before it")
            self.taken.append(name)
            return Open(self._ways), Open(self._ways)

        return norm


def _layer(methods: Methods, layout: Layout, ways: Ways, real: Any) -> None:
    norms = _Norms(layout, ways)
    parts: dict[str, Any] = {name: norms.part(name) for name in (*norms.first, *norms.second)}
    if "input_layernorm" not in parts:
        parts["input_layernorm"] = norms.part("input_layernorm")
    for name in ("self_attn", "mlp"):
        parts[name] = _Part(ways, name, getattr(real, name, None))
    last = next(reversed(norms.second.values()))
    layer = Self(ways, parts, methods, real)
    names = _incoming(methods, real)
    for hidden, residual in ((Open(ways), None), (Sealed(last), Open(ways))):
        norms.taken.clear()
        given = dict(zip(names, (hidden, residual), strict=True))
        result = layer.forward(**arguments(methods["forward"], ways, given))
        if not isinstance(result, tuple) or len(result) != 2 or name_of(result[0]) != last:
            raise Refused(f"it does not return what {last} makes and the residual")
        if sealed_in(result[1]):
            raise Refused("the residual that it returns is not complete")
        expected = [*norms.second]
        if residual is None:
            expected.remove("input_layernorm")
        if sorted(norms.taken) != sorted(expected):
            raise Refused(f"of {', '.join(expected)} it calls {', '.join(norms.taken) or 'none'}")


def _incoming(methods: Methods, real: Any) -> list[str]:
    """The arguments that are the hidden states and the residual: the first norm is given them."""
    ways = Ways()
    given = arguments(methods["forward"], ways, {})
    seen: list[Any] = []

    def norm(*values: Any) -> Any:
        seen.extend(values)
        return Open(ways), Open(ways)

    with suppress(Exception):  # reported when it runs again, with everything in its place
        Self(ways, {"input_layernorm": norm}, methods, real).forward(**given)
    names = [name for value in seen[:2] for name, one in given.items() if one is value]
    if len(names) != 2:
        raise Refused("input_layernorm is not given the hidden states and the residual")
    return names


class _Part:
    """A block of a layer: whatever goes in has to be complete, what comes out is sealed."""

    def __init__(self, ways: Ways, name: str, real: Any) -> None:
        self._ways, self._name, self._real = ways, name, real

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = sealed_in((args, kwargs))
        if found:
            raise Refused(f"the output of {found} goes into {self._name}")
        return Sealed(self._name)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name, None)
        return value if isinstance(value, (bool, int, float, str)) else Open(self._ways, name)


def _model(methods: Methods, ways: Ways, real: Any) -> None:
    calls: list[str] = []

    def layer(*args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        sealed = [name_of(value) for value in values if type(value) is Sealed]
        if sealed != calls[-1:]:
            raise Refused("a layer is not given what the layer before returned")
        if calls and not any(value is residuals[-1] for value in values):
            raise Refused("a layer is not given the residual of the layer before")
        calls.append(f"layer {len(calls)}")
        residuals.append(Open(ways))
        return Sealed(calls[-1]), residuals[-1]

    def norm(x: Any, residual: Any = None) -> Any:
        if len(calls) != 2 or name_of(x) != calls[-1] or residual is not residuals[-1]:
            raise Refused("the last norm is not given what the last layer returned")
        calls.append("norm")
        return Open(ways), Open(ways)

    residuals: list[Any] = []
    parts = {"layers": [layer, layer], "norm": norm, "start_layer": 0, "end_layer": 2}
    parts["layers_to_capture"] = []  # if some are, nothing is handed on
    model = Self(ways, parts, methods, real)
    result = model.forward(**arguments(methods["forward"], ways, {}))
    if sealed_in(result) or calls[-1:] != ["norm"]:
        raise Refused("it returns what was not through its last norm")


def _block(methods: Methods, projection: str, ways: Ways, real: Any) -> None:
    calls: list[str] = []

    def project(*args: Any, **kwargs: Any) -> Any:
        calls.append(projection)
        return Sealed(projection), None

    block = Self(ways, {projection: project}, methods, real)
    result = block.forward(**arguments(methods["forward"], ways, {}))
    if len(calls) != 1 or name_of(result) != projection:
        raise Refused(f"it does not return what {projection} makes")
