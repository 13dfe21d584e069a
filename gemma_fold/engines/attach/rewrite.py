"""A layer's forward with its sandwiches fused, and every other statement as it was.

The calls of the two norms and the add between them become calls of methods that the layer gets from
:class:`gemma_fold.engines.transformers.layers.SandwichLayer`:

    h = self.post(h)            h = h
    h = residual + h            h = (pair := self._fused(residual, h, False, "post", "pre", ""))[0]
    y = self.pre(h)             y = pair.pop()
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from gemma_fold.engines.attach.pattern import Found, Site

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
