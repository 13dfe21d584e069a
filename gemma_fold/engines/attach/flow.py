"""Which value goes where in a function, whatever its variables are called.

The statements are read in the order in which they run. Every expression makes a value, and a name
stands for the value that was last bound to it, so that renamed or reused variables make no
difference. What cannot be followed (another branch, the next round of a loop, a function defined
inside) counts as a use of every value that reaches it, and hides what it was.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["parameter", "norm", "dropout", "add", "tuple", "other"]
#: Functions that see every variable, or change what names mean.
_ALL_SEEING = frozenset({"locals", "vars", "eval", "exec", "dir", "globals"})
_SCOPES = (
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
)
_REFUSED = (
    ast.Global,
    ast.Nonlocal,
    ast.Yield,
    ast.YieldFrom,
    ast.Await,
    ast.AsyncFor,
    ast.Match,
)


class Unfollowable(Exception):
    """A function that does what cannot be followed; the message is what."""


@dataclass(eq=False, slots=True)
class Value:
    """What an expression makes.

    Attributes:
        name: the attribute of `self` that is called, or the parameter.
        at: its place in the order of events.
        block: the run of statements that it lies in.
        inputs: the values that it is made of.
        uses: what becomes of it, in words, with the value made of it if there is one.
    """

    kind: Kind
    node: ast.expr | None
    at: int
    block: int
    name: str = ""
    inputs: tuple[Value, ...] = ()
    uses: list[tuple[str, Value | None]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens: a `value` is made, or a `deed` that may change one."""

    value: Value | None = None
    deed: str = ""


@dataclass(slots=True)
class Flow:
    """A function, followed.

    Attributes:
        misuse: attributes of `self` among those asked for that are not just called, and how.
    """

    events: list[Event] = field(default_factory=list)
    misuse: dict[str, str] = field(default_factory=dict)
    returned: list[Value] = field(default_factory=list)

    def values(self, kind: Kind) -> Iterator[Value]:
        return (e.value for e in self.events if e.value is not None and e.value.kind == kind)

    def deeds(self, first: Value, last: Value) -> list[str]:
        """What may change a value between two others."""
        return [event.deed for event in self.events[first.at : last.at] if event.deed]


def follow(tree: ast.FunctionDef, kinds: Mapping[str, Kind], globals_: dict[str, Any]) -> Flow:
    """Follow the values of a method.

    Args:
        tree: its definition.
        kinds: which attributes of `self`, called with one argument, are norms and dropouts.
        globals_: of the function, to distinguish a logger from other objects.

    Raises:
        Unfollowable: it does what cannot be followed.
    """
    return _Follower(tree, kinds, globals_).run()


class _Follower:
    def __init__(
        self, tree: ast.FunctionDef, kinds: Mapping[str, Kind], globals_: dict[str, Any]
    ) -> None:
        self._tree = tree
        self._kinds = kinds
        self._globals = globals_
        self._flow = Flow()
        self._block = self._blocks = 0
        self._names: dict[str, Value] = {}
        parameters = [*tree.args.posonlyargs, *tree.args.args]
        if not parameters:
            raise Unfollowable("it is not a method")
        self._self = parameters[0].arg
        self._captured = _captured(tree)

    def run(self) -> Flow:
        for node in ast.walk(self._tree):
            if isinstance(node, _REFUSED):
                raise Unfollowable(f"it has a {type(node).__name__.lower()} in it")
            if isinstance(node, ast.Name):
                if node.id in _ALL_SEEING:
                    raise Unfollowable(f"it calls {node.id}()")
                if node.id == self._self and not isinstance(node.ctx, ast.Load):
                    raise Unfollowable(f"it rebinds {self._self}")
        args = self._tree.args
        rest = [arg for arg in (args.vararg, args.kwarg) if arg is not None]
        for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, *rest):
            self._bind(arg.arg, self._made("parameter", None, name=arg.arg))
        self._statements(self._tree.body)
        return self._flow

    # Values

    def _made(
        self, kind: Kind, node: ast.expr | None, name: str = "", inputs: tuple[Value, ...] = ()
    ) -> Value:
        value = Value(kind, node, len(self._flow.events), self._block, name, inputs)
        self._flow.events.append(Event(value))
        return value

    def _did(self, deed: str) -> None:
        self._flow.events.append(Event(deed=deed))

    def _bind(self, name: str, value: Value) -> None:
        if name in self._captured:
            value.uses.append(("is kept by a function defined inside", None))
        self._names[name] = value

    # Statements

    def _statements(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            value = self._expression(node.value)
            for target in node.targets:
                self._assign(target, value)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self._assign(node.target, self._expression(node.value))
        elif isinstance(node, ast.AugAssign):
            self._augmented(node)
        elif isinstance(node, ast.Return):
            if node.value is not None:
                value = self._expression(node.value)
                value.uses.append(("is returned", None))
                self._flow.returned.append(value)
            self._did("a return")
        elif isinstance(node, ast.Expr):
            self._expression(node.value)
        elif isinstance(node, ast.If):
            self._expression(node.test).uses.append(("is tested", None))
            self._branches([node.body, node.orelse], loops=False)
        elif isinstance(node, (ast.Pass, ast.Import, ast.ImportFrom)):
            for alias in getattr(node, "names", ()):
                name = (alias.asname or alias.name).partition(".")[0]
                self._bind(name, self._made("other", None))
        elif isinstance(node, ast.Assert):
            self._expression(node.test).uses.append(("is tested", None))
        elif isinstance(node, _SCOPES):
            self._scope(node)
            self._bind(node.name, self._made("other", None))
        else:
            self._compound(node)

    def _augmented(self, node: ast.AugAssign) -> None:
        value = self._expression(node.value)
        self._did("an operation in place")
        if isinstance(node.target, ast.Name):
            before = self._names.get(node.target.id)
            if before is not None:
                before.uses.append(("is changed in place", None))
            value.uses.append(("is used in place", None))
            self._bind(node.target.id, self._made("other", None))
        else:
            value.uses.append(("is used in place", None))
            self._expressions(node.target)

    def _compound(self, node: ast.stmt) -> None:
        """for, while, with, try, raise, del: their parts, with nothing known of them."""
        name = type(node).__name__.lower()
        self._did(f"a {name} statement")
        bodies: list[list[ast.stmt]] = []
        for _, part in ast.iter_fields(node):
            parts = part if isinstance(part, list) else [part]
            for one in parts:
                if isinstance(one, ast.expr):
                    if isinstance(getattr(one, "ctx", None), ast.Load) or not hasattr(one, "ctx"):
                        self._expression(one).uses.append((f"goes into a {name}", None))
                    else:
                        self._assign(one, self._made("other", None))
                elif isinstance(one, ast.withitem):
                    self._expression(one.context_expr).uses.append((f"goes into a {name}", None))
                    if one.optional_vars is not None:
                        self._assign(one.optional_vars, self._made("other", None))
                elif isinstance(one, ast.ExceptHandler):
                    self._forget({one.name} if one.name else set())
                    bodies.append(list(one.body))
            if parts and isinstance(parts[0], ast.stmt):
                bodies.append(list(parts))
        self._branches(bodies, loops=isinstance(node, (ast.For, ast.While)))

    def _branches(self, bodies: list[list[ast.stmt]], *, loops: bool) -> None:
        stored = {
            node.id
            for body in bodies
            for statement in body
            for node in ast.walk(statement)
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        }
        if loops:
            self._forget(stored)
        before = dict(self._names)
        outside = self._block
        for body in bodies:
            self._names = dict(before)
            self._blocks += 1
            self._block = self._blocks
            self._statements(body)
            for name in stored & set(self._names):
                self._names[name].uses.append(("is kept for after a branch", None))
        self._block = outside
        self._names = before
        self._forget(stored)

    def _forget(self, names: set[str]) -> None:
        for name in names:
            if name in self._names:
                self._names[name].uses.append(("may be kept past a branch", None))
            self._bind(name, self._made("other", None))

    def _assign(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self._bind(target.id, value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            value.uses.append(("is unpacked", None))
            for element in target.elts:
                self._assign(element, self._made("other", None))
        elif isinstance(target, ast.Starred):
            self._assign(target.value, value)
        else:
            value.uses.append(("is stored", None))
            attribute = self._attribute(target)
            if attribute in self._kinds:
                self._flow.misuse[str(attribute)] = "is replaced"
            self._expressions(target)
            self._did("a store into an object")

    # Expressions

    def _expressions(self, node: ast.AST) -> tuple[Value, ...]:
        """The values of the expressions right inside `node`."""
        found = []
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                found.append(self._expression(child))
            elif isinstance(child, ast.keyword):
                found.append(self._expression(child.value))
            elif not isinstance(child, (ast.expr_context, ast.operator, ast.unaryop, ast.cmpop)):
                found.extend(self._expressions(child))
        return tuple(found)

    def _expression(self, node: ast.expr) -> Value:
        if isinstance(node, ast.Name):
            return self._names.get(node.id) or self._made("other", node)
        if isinstance(node, ast.NamedExpr):
            value = self._expression(node.value)
            self._bind(node.target.id, value)
            return value
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, _SCOPES):
            self._scope(node)
            return self._made("other", node)
        if isinstance(node, (ast.IfExp, ast.BoolOp)):
            return self._choice(node)
        attribute = self._attribute(node)
        if attribute is not None:
            if attribute in self._kinds:
                self._flow.misuse.setdefault(attribute, "is not just called")
            return self._made("other", node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            operands = (self._expression(node.left), self._expression(node.right))
            return self._used(self._made("add", node, inputs=operands), "is added")
        kind: Kind = "tuple" if isinstance(node, ast.Tuple) else "other"
        inputs = self._expressions(node)
        return self._used(self._made(kind, node, inputs=inputs), _words(node))

    def _choice(self, node: ast.IfExp | ast.BoolOp) -> Value:
        parts = [node.test, node.body, node.orelse] if isinstance(node, ast.IfExp) else node.values
        inputs = [self._expression(parts[0])]
        outside = self._block
        for part in parts[1:]:
            self._blocks += 1
            self._block = self._blocks
            inputs.append(self._expression(part))
        self._block = outside
        return self._used(self._made("other", node, inputs=tuple(inputs)), "is chosen or not")

    def _call(self, node: ast.Call) -> Value:
        attribute = self._attribute(node.func)
        kind = self._kinds.get(attribute or "")
        if attribute is not None and kind is not None:
            simple = len(node.args) == 1 and not node.keywords
            if simple and not isinstance(node.args[0], ast.Starred):
                argument = self._expression(node.args[0])
                return self._used(
                    self._made(kind, node, attribute, (argument,)), f"goes into {attribute}"
                )
            self._flow.misuse[attribute] = "is called with more than one argument"
        name = ast.unparse(node.func)
        inputs = self._expressions(node)
        if not self._is_log(node.func):
            self._did(f"a call of {name}")
        return self._used(self._made("other", node, inputs=inputs), f"goes into {name}()")

    def _attribute(self, node: ast.expr) -> str | None:
        """The name of an attribute of `self`."""
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == self._self
        ):
            return node.attr
        return None

    def _is_log(self, function: ast.expr) -> bool:
        """Whether a call of it writes a message and does nothing else."""
        if isinstance(function, ast.Name):
            return function.id == "print" and function.id not in self._globals
        if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
            return False
        if function.value.id in self._names:
            return False
        holder = self._globals.get(function.value.id)
        return isinstance(holder, logging.Logger) or (
            holder is warnings and function.attr == "warn"
        )

    def _scope(self, node: ast.AST) -> None:
        """A function defined inside may read what it names now or later."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and inner.id in self._names:
                self._names[inner.id].uses.append(("is read by a function defined inside", None))
            attribute = self._attribute(inner) if isinstance(inner, ast.expr) else None
            if attribute in self._kinds:
                self._flow.misuse[str(attribute)] = "is used by a function defined inside"
            if isinstance(inner, ast.Call):
                self._did("a call inside a comprehension or a function")

    def _used(self, value: Value, how: str) -> Value:
        for one in value.inputs:
            one.uses.append((how, value))
        return value


def _words(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"has its .{node.attr} read"
    if isinstance(node, ast.BinOp):
        return f"goes into a {type(node.op).__name__.lower()}"
    return f"goes into a {type(node).__name__.lower()}"


def _captured(tree: ast.FunctionDef) -> frozenset[str]:
    """Names that functions defined inside read: at any time, so every value of theirs counts."""
    return frozenset(
        inner.id
        for statement in tree.body
        for node in ast.walk(statement)
        if isinstance(node, _SCOPES)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name)
    )
