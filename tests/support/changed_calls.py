"""A call of one attribute, written in another form: what both kinds of mutants are made with."""

from __future__ import annotations

import ast


class ChangedCalls(ast.NodeTransformer):
    """Every call of an attribute as `form` says.

    Names in it: f, what is called; a, its positional arguments; x and r, the first and the second
    of them; n, the attribute.
    """

    def __init__(self, attribute: str, form: str) -> None:
        self.attribute, self.form = attribute, form

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Attribute) or node.func.attr != self.attribute:
            return node
        values = [ast.unparse(argument) for argument in node.args]
        names = {
            "f": ast.unparse(node.func),
            "a": ", ".join(values),
            "x": values[0] if values else "",
            "r": values[1] if len(values) > 1 else "None",
            "n": self.attribute,
        }
        return ast.parse(self.form.format(**names), mode="eval").body
