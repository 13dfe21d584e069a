"""A function's source as it runs, and a function made from changed source.

A changed function keeps what the original has beside its statements: globals, closure, defaults,
name and decorators. A decorator is not run again: its wrapper is copied, around the new function.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

#: Flags of `from __future__ import`, which the compiler is given.
_FUTURE = 0xFFF0000


class Unreadable(Exception):
    """A function whose statements cannot be read; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Code:
    """A function and its statements.

    Attributes:
        function: what the decorators wrap.
        wrappers: those, outermost first.
        tree: its definition.
    """

    function: types.FunctionType
    wrappers: tuple[types.FunctionType, ...]
    tree: ast.FunctionDef


def read(function: Callable[..., Any]) -> Code:
    """The statements of `function`.

    Raises:
        Unreadable: they are not there, or not those that run.
    """
    wrappers: list[Any] = []
    while hasattr(function, "__wrapped__"):
        wrappers.append(function)
        function = function.__wrapped__
    if not isinstance(function, types.FunctionType):
        raise Unreadable("it is not a Python function")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError) as error:
        raise Unreadable("its source is not there") from error
    if not isinstance(tree, ast.FunctionDef):
        raise Unreadable("it is not a plain function")
    for wrapper in wrappers:
        if not _wraps(wrapper):
            raise Unreadable("one of its decorators is not a plain function around it")
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)  # for its tracebacks
    code = Code(function, tuple(wrappers), tree)
    if not _same(_compiled(code, tree), function.__code__):
        raise Unreadable("its source is not the code that runs")
    return code


def rebuilt(code: Code, tree: ast.FunctionDef) -> Callable[..., Any]:
    """The function with the statements of `tree`, decorators included."""
    old = code.function
    compiled = _compiled(code, tree)
    cells = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in compiled.co_freevars)
    new = types.FunctionType(compiled, old.__globals__, old.__name__, old.__defaults__, closure)
    new = _dressed(new, old)
    inner: Any = old
    for wrapper in reversed(code.wrappers):
        new, inner = _rewrapped(wrapper, inner, new), wrapper
    return new


def _compiled(code: Code, tree: ast.FunctionDef) -> types.CodeType:
    """The code object of `tree`, compiled where names mean what they mean in the original."""
    old = code.function
    bare = copy.copy(tree)
    bare.decorator_list, bare.returns = [], None
    module = ast.parse("def around(): pass")
    around = module.body[0]
    assert isinstance(around, ast.FunctionDef)
    free = [name for name in old.__code__.co_freevars if name != "__class__"]
    around.args.args = [ast.arg(name) for name in free]
    body: ast.stmt = bare
    owner = old.__qualname__.split(".")[-2:-1]
    if owner and owner[0].isidentifier():  # private names and super() need their class
        body = ast.parse(f"class {owner[0]}: pass").body[0]
        assert isinstance(body, ast.ClassDef)
        body.body = [bare]
    around.body = [body]
    ast.copy_location(around, bare)
    ast.fix_missing_locations(module)
    flags = old.__code__.co_flags & _FUTURE
    compiled = compile(module, old.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    found = _find(compiled, tree.name)
    if found is None or set(found.co_freevars) - set(old.__code__.co_freevars):
        raise Unreadable("it reads variables of a function around it")
    return found


def _find(code: types.CodeType, name: str) -> types.CodeType | None:
    """The innermost of the first chain of code objects that ends in one called `name`."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            return constant if constant.co_name == name else _find(constant, name)
    return None


_facts = attrgetter("co_code", "co_names", "co_varnames", "co_freevars")


def _same(one: types.CodeType, two: types.CodeType) -> bool:
    if _facts(one) != _facts(two) or len(one.co_consts) != len(two.co_consts):
        return False
    for first, second in zip(one.co_consts, two.co_consts, strict=True):
        if isinstance(first, types.CodeType) and isinstance(second, types.CodeType):
            if not _same(first, second):
                return False
        elif type(first) is not type(second) or first != second:
            return False
    return True


def _wraps(wrapper: Any) -> bool:
    return isinstance(wrapper, types.FunctionType) and bool(
        _cells(wrapper, wrapper.__wrapped__)  # type: ignore[attr-defined]
    )


def _cells(wrapper: types.FunctionType, content: Any) -> list[int]:
    """Which cells of a decorator's wrapper hold `content`."""
    found = []
    for index, cell in enumerate(wrapper.__closure__ or ()):
        try:
            if cell.cell_contents is content:
                found.append(index)
        except ValueError:  # an empty cell
            continue
    return found


def _rewrapped(wrapper: types.FunctionType, inner: Any, new: Any) -> types.FunctionType:
    closure = list(wrapper.__closure__ or ())
    for index in _cells(wrapper, inner):
        closure[index] = types.CellType(new)
    itself = types.CellType()  # a wrapper that asks whether it is the outermost one
    for index in _cells(wrapper, wrapper):
        closure[index] = itself
    rewrapped = types.FunctionType(
        wrapper.__code__,
        wrapper.__globals__,
        wrapper.__name__,
        wrapper.__defaults__,
        tuple(closure),
    )
    rewrapped = _dressed(rewrapped, wrapper)
    rewrapped.__wrapped__ = new  # type: ignore[attr-defined]
    itself.cell_contents = rewrapped
    return rewrapped


def _dressed(new: types.FunctionType, old: types.FunctionType) -> types.FunctionType:
    new.__kwdefaults__ = old.__kwdefaults__
    new.__dict__.update(old.__dict__)
    new.__annotations__ = old.__annotations__
    new.__doc__, new.__module__, new.__qualname__ = old.__doc__, old.__module__, old.__qualname__
    return new
