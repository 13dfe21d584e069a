"""The places in a layer where a norm, a residual add and the next norm follow each other.

    normed = post(x)               # read by nothing but the add
    total = residual + normed      # either way round, with a dropout between if there is one
    y = pre(total)                 # or: total is returned, and the next layer norms it

are one operator on (x, residual), wherever the three stand, as long as nothing between them can
change what they read. :func:`rewrite` makes their calls calls of methods that the layer gets from
:class:`gemma_fold.engines.transformers.layers.SandwichLayer`, and leaves every other statement:

    h = self.post(h)            h = h
    h = residual + h            h = (pair := self._fused(residual, h, False, "post", "pre", ""))[0]
    y = self.pre(h)             y = pair.pop()
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from gemma_fold.engines.attach.flow import Flow, Kind, Value, follow


@dataclass(frozen=True, slots=True)
class Site:
    """One sandwich.

    Attributes:
        post: the first norm.
        dropout: between it and the add, if there is one.
        add: the residual add.
        pre: the second norm; None if the sum is returned.
    """

    post: Value
    dropout: Value | None
    add: Value
    pre: Value | None


@dataclass(frozen=True, slots=True)
class Found:
    """What there is in a forward.

    Attributes:
        sites: its sandwiches.
        entry: the norm of the hidden states as they come in, if there is one.
        missing: norms that are part of no site, each with the reason.
    """

    sites: tuple[Site, ...]
    entry: Value | None
    missing: tuple[tuple[str, str], ...]


def find(
    tree: ast.FunctionDef,
    norms: Collection[str],
    dropouts: Collection[str],
    globals_: dict[str, Any],
) -> Found:
    """The sandwiches of a layer's forward.

    Raises:
        Unfollowable: it cannot be followed.
    """
    kinds: dict[str, Kind] = {name: "norm" for name in norms}
    kinds |= {name: "dropout" for name in dropouts}
    flow = follow(tree, kinds, globals_)
    finder = _Finder(flow)
    values = list(flow.values("norm"))
    sites = finder.sites(values)
    taken = [*(site.post for site in sites), *(site.pre for site in sites if site.pre is not None)]
    entry = next((v for v in values if finder.is_entry(v) and v not in taken), None)
    used = {value.name for value in (*taken, entry) if value is not None}
    # The norm of a sum has no other reason than the norm before that sum.
    used |= {value.name for value in values if value.inputs[0].kind == "add"}
    missing = [
        (name, finder.reasons.get(name) or f"it {flow.misuse.get(name, 'is not called')}")
        for name in dict.fromkeys([*(value.name for value in values), *norms])
        if name not in used
    ]
    return Found(tuple(sites), entry, tuple(missing))


class _Finder:
    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self.reasons: dict[str, str] = {}

    def is_entry(self, value: Value) -> bool:
        return (
            value.block == 0
            and value.inputs[0].kind == "parameter"
            and value.name not in self._flow.misuse
        )

    def sites(self, norms: list[Value]) -> list[Site]:
        """The sandwiches that begin with one of `norms`; for the others a reason is kept."""
        found: list[Site] = []
        for norm in norms:
            problem, site = self._site(norm)
            if site is not None and _overlaps(site, found):
                problem, site = "it is part of another sandwich", None
            if site is not None:
                found.append(site)
            else:
                self.reasons.setdefault(norm.name, problem)
        return found

    def _site(self, post: Value) -> tuple[str, Site | None]:
        if post.name in self._flow.misuse:
            return f"it {self._flow.misuse[post.name]}", None
        dropout: Value | None = None
        normed = post
        add = _only_user(post)
        if add is not None and add.kind == "dropout" and add.name not in self._flow.misuse:
            dropout = normed = add
            add = _only_user(add)
        if add is None or add.kind != "add" or add.node is None:
            return f"residual add not found after it: its output {_uses(normed)}", None
        if add.inputs[0] is add.inputs[1]:
            return "its output is added to itself", None
        if not _one_run(post, dropout, add):
            return "the residual add is in another branch", None
        between = self._flow.deeds(post, add)
        if between:
            return f"before the residual add comes {between[0]}", None
        problem, pre = self._next(add)
        return problem, None if problem else Site(post, dropout, add, pre)

    def _next(self, add: Value) -> tuple[str, Value | None]:
        """The norm of the sum; nothing if the sum is returned instead."""
        norms = [user for _, user in add.uses if user is not None and user.kind == "norm"]
        for pre in norms:
            if pre.name in self._flow.misuse or not _one_run(add, pre):
                continue
            between = self._flow.deeds(add, pre)
            if between:
                problem = f"between the residual add and {pre.name} comes {between[0]}"
                self.reasons.setdefault(pre.name, problem)
                return problem, None
            return "", pre
        if any(_first(value) is add for value in self._flow.returned):
            return "", None
        return f"no norm follows the residual add: the sum {_uses(add)}", None


def _overlaps(site: Site, others: list[Site]) -> bool:
    return any(
        value in (other.add, other.pre) for other in others for value in (site.add, site.post)
    )


def _only_user(value: Value) -> Value | None:
    return value.uses[0][1] if len(value.uses) == 1 else None


def _one_run(*values: Value | None) -> bool:
    return len({value.block for value in values if value is not None}) == 1


def _first(value: Value) -> Value:
    return value.inputs[0] if value.kind == "tuple" and value.inputs else value


def _uses(value: Value) -> str:
    words = list(dict.fromkeys(how for how, _ in value.uses))
    return " and ".join(words) if words else "is not used"


_Replace = Callable[[ast.expr], ast.expr]


def rewrite(tree: ast.FunctionDef, found: Found) -> ast.FunctionDef:
    """Change `tree`, in which `found` was found, in place; returns it."""
    first = [*tree.args.posonlyargs, *tree.args.args][0].arg
    changes: dict[int, _Replace] = {}
    for number, site in enumerate(found.sites):
        _site(changes, site, first, f"_gemma_fold_{number}")
    if found.entry is not None:
        name = ast.Constant(found.entry.name)
        changes[id(found.entry.node)] = lambda node: _call(
            first, "_entered", [_argument(node), name]
        )
    changed = _Rewriter(changes).visit(tree)
    assert isinstance(changed, ast.FunctionDef)
    return ast.fix_missing_locations(changed)


def _site(changes: dict[int, _Replace], site: Site, first: str, pair: str) -> None:
    normed = site.dropout or site.post
    changes[id(site.post.node)] = changes[id(normed.node)] = _argument
    names = [site.post.name, *([site.pre.name] if site.pre is not None else [])]
    names.append(site.dropout.name if site.dropout is not None else "")

    def fused(node: ast.expr) -> ast.expr:
        assert isinstance(node, ast.BinOp)
        left = ast.Constant(site.add.inputs[0] is normed)
        operands = [node.left, node.right, left, *map(ast.Constant, names)]
        if site.pre is None:
            return _call(first, "_left", operands)
        kept = ast.NamedExpr(ast.Name(pair, ast.Store()), _call(first, "_fused", operands))
        return ast.Subscript(kept, ast.Constant(0), ast.Load())

    def popped(node: ast.expr) -> ast.expr:
        argument = _argument(node)
        value = ast.Call(ast.Attribute(ast.Name(pair, ast.Load()), "pop", ast.Load()), [], [])
        if isinstance(argument, ast.Name):
            return value
        both = ast.Tuple([argument, value], ast.Load())  # the add may be inside, and comes first
        return ast.Subscript(both, ast.Constant(1), ast.Load())

    changes[id(site.add.node)] = fused
    if site.pre is not None:
        changes[id(site.pre.node)] = popped


def _argument(node: ast.expr) -> ast.expr:
    assert isinstance(node, ast.Call)
    return node.args[0]


def _call(first: str, method: str, arguments: list[ast.expr]) -> ast.expr:
    function = ast.Attribute(ast.Name(first, ast.Load()), method, ast.Load())
    return ast.Call(function, arguments, [])


class _Rewriter(ast.NodeTransformer):
    def __init__(self, changes: dict[int, _Replace]) -> None:
        self._changes = changes

    def visit(self, node: ast.AST) -> ast.AST:
        change = self._changes.get(id(node))
        self.generic_visit(node)
        if change is None:
            return node
        assert isinstance(node, ast.expr)
        return change(node)
