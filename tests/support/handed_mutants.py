"""Changed forwards of layers that hand a norm's input on, and what has to become of them.

`expect` is decided by what a change does: full where nothing looks at what is handed on, less where
something does, any where both are right.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from changed_calls import ChangedCalls

Expect = Literal["full", "less", "any"]

#: A layer in the protocol of vLLM and SGLang, written for these tests.
OWN = """
def forward(self, positions, hidden_states, batch=None, residual=None, **kwargs):
    if residual is None:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
    else:
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
    hidden_states = self.self_attn(positions, hidden_states, batch, **kwargs)
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states, residual = self.pre_feedforward_layernorm(hidden_states, residual)
    hidden_states = self.mlp(hidden_states)
    hidden_states = self.post_feedforward_layernorm(hidden_states)
    outputs = (hidden_states, residual)
    return outputs
"""


@dataclass(frozen=True)
class Mutant:
    name: str
    expect: Expect
    tree: ast.FunctionDef

    def function(self) -> Callable[..., Any]:
        names: dict[str, Any] = {"logger": _Quiet(), "_observe": lambda x: x}
        module = ast.fix_missing_locations(ast.Module([self.tree], []))
        exec(compile(module, self.name, "exec"), names)
        forward: Callable[..., Any] = names["forward"]
        return forward


class _Quiet:
    def debug(self, *args: Any) -> None:
        """Writes nothing."""


def own() -> ast.FunctionDef:
    return _function(OWN)


def installed(file: Path, cls: str) -> ast.FunctionDef:
    """The forward of a layer in an engine's source."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "forward":
                    method.decorator_list, method.returns = [], None
                    for argument in ast.walk(method.args):
                        if isinstance(argument, ast.arg):
                            argument.annotation = None
                    return method
    raise LookupError(f"{cls} is not in {file}")


def _function(source: str) -> ast.FunctionDef:
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return tree


def mutants(tree: ast.FunctionDef) -> list[Mutant]:
    made = []
    for make in (_neutral, _inserted, _called, _returned):
        made += [Mutant(name, expect, changed) for name, expect, changed in make(tree)]
    return made


_Made = Iterator[tuple[str, Expect, ast.FunctionDef]]


def _names(tree: ast.FunctionDef, **names: str) -> ast.FunctionDef:
    tree = copy.deepcopy(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
        elif isinstance(node, ast.arg):
            node.arg = names.get(node.arg, node.arg)
    return tree


def _neutral(tree: ast.FunctionDef) -> _Made:
    yield "as it is", "full", copy.deepcopy(tree)
    for name in ("x", "h", "hidden", "states_", "normed", "positions_2", "out"):
        yield f"hidden_states as {name}", "full", _names(tree, hidden_states=name)
        yield f"residual as {name}", "full", _names(tree, residual=name)
        yield f"self as {name}", "full", _names(tree, self=name)
    yield "names swapped", "full", _names(tree, hidden_states="residual", residual="hidden_states")
    for number in range(4):
        added = copy.deepcopy(tree)
        added.args.kwonlyargs += [ast.arg(f"added_{i}") for i in range(number + 1)]
        added.args.kw_defaults += [ast.Constant(None)] * (number + 1)
        yield f"{number + 1} more arguments", "full", added
    around = copy.deepcopy(tree)
    around.body = ast.parse("with _observe('layer'):\n    pass").body
    around.body[0].body = copy.deepcopy(tree).body  # type: ignore[attr-defined]
    yield "inside a with", "any", around


_QUIET = {
    "another variable": "unrelated = 3 * 7 + 1",
    "a flag": "is_training = self.training",
    "a log line": "logger.debug('in a layer')",
    "a log line if": "if self.training:\n    logger.debug('training')",
    "a test of an argument": "if positions is None:\n    unrelated = 1",
    "a constant loop": "for _ in range(2):\n    unrelated = 2",
    "a pass": "pass",
}
#: What looks at the hidden states; harmless where they are complete.
_LOOKS = {
    "doubled": "twice = hidden_states * 2",
    "measured": "size = hidden_states.shape",
    "scaled": "hidden_states = hidden_states * 1.5",
    "scaled in place": "hidden_states.mul_(1.5)",
    "shifted in place": "hidden_states += 0.5",
    "cast": "hidden_states = hidden_states.float()",
    "copied": "hidden_states = hidden_states.clone()",
    "indexed": "first = hidden_states[0]",
    "given away": "_observe(hidden_states)",
    "negated": "less = -hidden_states",
    "compared": "same = hidden_states == 0",
    "tested": "if hidden_states.sum() > 0:\n    unrelated = 1",
    "returned early": "if hidden_states.sum() > 1e9:\n    return hidden_states, residual",
    "printed": "text = f'{hidden_states}'",
    "added to the residual": "residual = residual + hidden_states",
}


def _sealed_gaps(tree: ast.FunctionDef) -> set[int]:
    """Gaps between statements where `hidden_states` is not complete; gap i is before i."""
    index = {
        name: next(i for i, s in enumerate(tree.body) if f"self.{name}(" in ast.unparse(s))
        for name in ("self_attn", "pre_feedforward_layernorm", "mlp")
    }
    found = set(range(index["self_attn"] + 1, index["pre_feedforward_layernorm"] + 1))
    return {0} | found | set(range(index["mlp"] + 1, len(tree.body)))


def _inserted(tree: ast.FunctionDef) -> _Made:
    sealed = _sealed_gaps(tree)
    for gap in range(len(tree.body)):
        for name, source in (_QUIET | _LOOKS).items():
            if "residual" in source and gap == 0 and "return" not in source:
                continue  # there may be no residual yet
            changed = copy.deepcopy(tree)
            changed.body[gap:gap] = ast.parse(source).body
            looks = name in _LOOKS and gap in sealed
            expect: Expect = "less" if looks else "full"
            if name == "returned early" and not looks:
                expect = "any"  # it returns what is complete, which the next layer takes otherwise
            yield f"{name} at {gap}", expect, changed


_POSTS: tuple[tuple[str, Expect, str], ...] = (
    ("of a scaled input", "less", "{f}({x} * 2)"),
    ("scaled", "less", "{f}({x}) * 2"),
    ("cast", "less", "{f}({x}).float()"),
    ("twice", "less", "{f}({f}({x}))"),
    ("left out", "less", "{x}"),
    ("with a residual", "less", "{f}({x}, residual)"),
    ("with an epsilon", "less", "{f}({x}, None, 1e-3)"),
    ("chosen", "less", "{f}({x}) if self.training else {x} * 2"),
    ("in a list", "full", "[{f}({x})][0]"),
    ("by another name", "full", "(lambda norm: norm({x}))({f})"),
)
_PRES: tuple[tuple[str, Expect, str], ...] = (
    ("arguments swapped", "less", "{f}({r}, {x})"),
    ("without the residual", "less", "({f}({x}), {r})"),
    ("of a scaled input", "less", "{f}({x} * 2, {r})"),
    ("of a scaled residual", "full", "{f}({x}, {r} * 0.5)"),
    ("with itself as residual", "less", "{f}({x}, {x})"),
    ("in a tuple", "full", "tuple({f}({x}, {r}))"),
    ("with an epsilon", "less", "{f}({x}, {r}, 1e-3)"),
    ("left out", "less", "({x}, {r})"),
)


def _called(tree: ast.FunctionDef) -> _Made:
    for post in ("post_attention_layernorm", "post_feedforward_layernorm"):
        for name, expect, form in _POSTS:
            yield f"{post} {name}", expect, ChangedCalls(post, form).visit(copy.deepcopy(tree))
    for name, expect, form in _PRES:
        changed = ChangedCalls("pre_feedforward_layernorm", form).visit(copy.deepcopy(tree))
        yield f"pre_feedforward_layernorm {name}", expect, changed
    order = copy.deepcopy(tree)
    for node in ast.walk(order):
        if isinstance(node, ast.Attribute) and node.attr.startswith("post_"):
            node.attr = {
                "post_attention_layernorm": "post_feedforward_layernorm",
                "post_feedforward_layernorm": "post_attention_layernorm",
            }[node.attr]
    yield "the norms after the blocks swapped", "less", order


def _returned(tree: ast.FunctionDef) -> _Made:
    forms: tuple[tuple[str, Expect, str], ...] = (
        ("swapped", "less", "return residual, hidden_states"),
        ("added", "less", "return hidden_states + residual, residual"),
        ("alone", "less", "return hidden_states"),
        ("scaled", "less", "return hidden_states * 2, residual"),
        ("with a third", "less", "return hidden_states, residual, None"),
        ("twice", "less", "return hidden_states, hidden_states"),
        ("in a list", "any", "return [hidden_states, residual]"),
        ("a scaled residual", "full", "return hidden_states, residual * 0.5"),
        ("as a tuple", "full", "return (hidden_states, residual)"),
    )
    for name, expect, source in forms:
        changed = copy.deepcopy(tree)
        changed.body[-1:] = ast.parse(source).body
        yield f"returned {name}", expect, changed
