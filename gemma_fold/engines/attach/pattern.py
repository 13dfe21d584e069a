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
        post: the first norm, by attribute.
        pre: the second; empty if the sum is returned.
        dropout: between the first norm and the add, or empty.
        left: whether the normed operand of the add is the left one.
        post_node: the expression to change, as the other nodes are.
    """

    post: str
    pre: str
    dropout: str
    left: bool
    post_node: ast.expr
    dropout_node: ast.expr | None
    add_node: ast.expr
    pre_node: ast.expr | None


@dataclass(frozen=True, slots=True)
class Found:
    """What there is in a forward.

    Attributes:
        sites: its sandwiches.
        entry: the norm of the hidden states as they come in, or empty.
        entry_node: its call.
        missing: norms that are part of no site, each with the reason.
    """

    sites: tuple[Site, ...]
    entry: str
    entry_node: ast.expr | None
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
    taken = {id(node) for site in sites for node in (site.post_node, site.pre_node)}
    entry = next((v for v in values if finder.is_entry(v) and id(v.node) not in taken), None)
    used = {name for site in sites for name in (site.post, site.pre)}
    if entry is not None:
        used.add(entry.name)
    # The norm of a sum has no other reason than the norm before that sum.
    used |= {value.name for value in values if value.inputs[0].kind == "add"}
    missing = [
        (name, finder.reasons.get(name) or f"it {flow.misuse.get(name, 'is not called')}")
        for name in dict.fromkeys([*(value.name for value in values), *norms])
        if name not in used
    ]
    return Found(
        tuple(sites),
        entry.name if entry is not None else "",
        entry.node if entry is not None else None,
        tuple(missing),
    )


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
        left = add.inputs[0] is normed
        between = self._flow.deeds(post, add)
        if between:
            return f"before the residual add comes {between[0]}", None
        problem, pre = self._next(add)
        if problem:
            return problem, None
        assert post.node is not None
        return "", Site(
            post.name,
            pre.name if pre is not None else "",
            dropout.name if dropout is not None else "",
            left,
            post.node,
            dropout.node if dropout is not None else None,
            add.node,
            pre.node if pre is not None else None,
        )

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
    taken = {id(node) for other in others for node in (other.add_node, other.pre_node)}
    return id(site.add_node) in taken or id(site.post_node) in taken


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
    if found.entry_node is not None:
        changes[id(found.entry_node)] = lambda node: _call(
            first, "_entered", [_argument(node), ast.Constant(found.entry)]
        )
    changed = _Rewriter(changes).visit(tree)
    assert isinstance(changed, ast.FunctionDef)
    return ast.fix_missing_locations(changed)


def _site(changes: dict[int, _Replace], site: Site, first: str, pair: str) -> None:
    changes[id(site.post_node)] = _argument
    if site.dropout_node is not None:
        changes[id(site.dropout_node)] = _argument

    def fused(node: ast.expr) -> ast.expr:
        assert isinstance(node, ast.BinOp)
        operands = [node.left, node.right, ast.Constant(site.left)]
        if not site.pre:
            names = [ast.Constant(name) for name in (site.post, site.dropout)]
            return _call(first, "_left", [*operands, *names])
        names = [ast.Constant(name) for name in (site.post, site.pre, site.dropout)]
        call = _call(first, "_fused", [*operands, *names])
        kept = ast.NamedExpr(ast.Name(pair, ast.Store()), call)
        return ast.Subscript(kept, ast.Constant(0), ast.Load())

    def popped(node: ast.expr) -> ast.expr:
        argument = _argument(node)
        value = ast.Call(ast.Attribute(ast.Name(pair, ast.Load()), "pop", ast.Load()), [], [])
        if isinstance(argument, ast.Name):
            return value
        both = ast.Tuple([argument, value], ast.Load())  # the add may be inside, and comes first
        return ast.Subscript(both, ast.Constant(1), ast.Load())

    changes[id(site.add_node)] = fused
    if site.pre_node is not None:
        changes[id(site.pre_node)] = popped


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
