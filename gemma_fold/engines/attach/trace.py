"""Run an engine's forward on stand-ins, to see what it does with a value that is not ready yet.

In vLLM and SGLang a norm after a block may hand its input on, and the next norm then does the work
of both, with the all-reduce before them. That is right only if nothing else looks at what is
handed on. So the layer's own code runs here with such a value sealed: it may be passed along and
given to the norm that is waiting for it, and every other use of it is refused. All else is open: it
can be used in every way, and if a branch depends on it, both ways are taken.
"""

from __future__ import annotations

import builtins
import dis
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

#: Ways through a forward that are tried before it is given up.
_MOST_WAYS = 64
_KEPT_MODULES = ("builtins", "itertools")


class Refused(Exception):
    """A sealed value is used, or ends up elsewhere; the message describes how."""


class Sealed:
    """A value that nothing may look at."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Sealed
        raise Refused(f"the output of {name_of(self)} has its .{name} read")


def name_of(value: Any) -> str:
    """What made a sealed value; empty for any other."""
    return str(object.__getattribute__(value, "_name")) if type(value) is Sealed else ""


class Open:
    """A value that can be anything: a tensor, a number, a module, a function."""

    def __init__(self, ways: Ways, name: str = "a function") -> None:
        self.__dict__.update(_ways=ways, _name=name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Open(self._ways, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._passed(value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._passed((args, kwargs))
        return Open(self._ways)

    def __bool__(self) -> bool:
        return bool(self._ways.choose())

    def __iter__(self) -> Iterator[Any]:
        caller = sys._getframe(1)
        code, at = caller.f_code.co_code, caller.f_lasti
        unpacked = dis.opname[code[at]] == "UNPACK_SEQUENCE"
        return iter([Open(self._ways) for _ in range(code[at + 1] if unpacked else 2)])

    def __len__(self) -> int:
        return 2

    def __hash__(self) -> int:
        return id(self)

    def __index__(self) -> int:
        return 1

    def _passed(self, values: Any) -> None:
        found = sealed_in(values)
        if found:
            raise Refused(f"the output of {found} goes into {self._name}")


def _operation(name: str) -> Callable[..., Any]:
    def operation(self: Any, *others: Any) -> Any:
        if type(self) is Sealed:
            raise Refused(f"the output of {name_of(self)} goes into {name.strip('_')}")
        self._passed(others)
        return Open(self._ways)

    return operation


_TWO_OPERANDS = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod"),
    *("pow", "and", "or", "xor", "lshift", "rshift"),
)
_OTHER_OPERATIONS = (
    *("neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge"),
    *("getitem", "setitem", "enter", "exit", "contains"),
)
_OPERATIONS = [f"__{way}{name}__" for name in _TWO_OPERANDS for way in ("", "r", "i")]
_OPERATIONS += [f"__{name}__" for name in _OTHER_OPERATIONS]
for _name in _OPERATIONS:
    setattr(Open, _name, _operation(_name))
    setattr(Sealed, _name, _operation(_name))
for _name in ("bool", "iter", "len", "hash", "index", "call", "format", "repr", "str", "setattr"):
    setattr(Sealed, f"__{_name}__", _operation(f"__{_name}__"))


def sealed_in(values: Any) -> str:
    """What made a sealed value inside `values`; empty if there is none."""
    if type(values) is Sealed:
        return name_of(values)
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        return next((found for value in values if (found := sealed_in(value))), "")
    return ""


class Ways:
    """Every way through code whose branches depend on open values, one after the other."""

    def __init__(self) -> None:
        self._choices: list[bool] = []
        self._at = 0

    def choose(self) -> bool:
        if self._at == len(self._choices):
            self._choices.append(True)
        self._at += 1
        return self._choices[self._at - 1]

    def all(self, run: Callable[[], None]) -> None:
        """Call `run` once for each way.

        Raises:
            Refused: there are too many.
        """
        for _ in range(_MOST_WAYS):
            self._at = 0
            run()
            del self._choices[self._at :]
            while self._choices and not self._choices[-1]:
                self._choices.pop()
            if not self._choices:
                return
            self._choices[-1] = False
        raise Refused("it has too many branches to follow")


class Self:
    """Stands for a module: its parts are stand-ins, its methods are its own."""

    def __init__(
        self,
        ways: Ways,
        parts: Mapping[str, Any],
        methods: Mapping[str, Callable[..., Any]],
        real: Any = None,
    ) -> None:
        """
        Args:
            ways: the ways through the forward.
            parts: stand-ins, by attribute.
            methods: functions of the class.
            real: the module, for its settings, or None if only its source is at hand.
        """
        self.__dict__.update(_ways=ways, _parts=parts, _methods=methods, _real=real)

    def __getattr__(self, name: str) -> Any:
        if name in self._parts:
            return self._parts[name]
        if name in self._methods:
            return types.MethodType(with_open_globals(self._methods[name], self._ways), self)
        value = getattr(self._real, name, None)
        return value if isinstance(value, (bool, int, float, str)) else Open(self._ways, name)

    def __setattr__(self, name: str, value: Any) -> None:
        found = sealed_in(value)
        if found:
            raise Refused(f"the output of {found} is kept in .{name}")
        raise Refused(f"it sets .{name}")


def with_open_globals(function: Callable[..., Any], ways: Ways) -> types.FunctionType:
    """The function with open values for what is in its module, whatever that is."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if not isinstance(function, types.FunctionType):
        raise Refused("it is not a Python function")
    names: dict[str, Any] = {"__builtins__": builtins, "islice": itertools.islice}
    for name in _names(function.__code__):
        real = function.__globals__.get(name)
        kept = real is not None and getattr(real, "__module__", "") in _KEPT_MODULES
        if kept or (real is None and hasattr(builtins, name)):
            names.setdefault(name, real if kept else getattr(builtins, name))
        else:
            names.setdefault(name, Open(ways, name))
    names["get_pp_group"] = lambda: types.SimpleNamespace(is_first_rank=True, is_last_rank=True)
    return types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def arguments(function: Callable[..., Any], ways: Ways, given: Mapping[str, Any]) -> dict[str, Any]:
    """Something open for every argument of a method that is not `given`."""
    code = with_open_globals(function, ways).__code__
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    missing = set(given) - set(names)
    if missing:
        raise Refused(f"it has no argument {min(missing)}")
    return {name: given[name] if name in given else Open(ways, name) for name in names}
