"""Forwards of decoder layers with a change somewhere, and what fusing has to make of them.

A mutant is the source of a class whose forward is the installed one with one change. `expect` is
decided here, by what the change does, and not by what the matcher finds:

* full: nothing that a sandwich reads is touched, so all of them stay fused;
* less: a sandwich reads something else now, or is read by something else, so it must not be fused;
* any: fused or not, as long as the results are those of the mutant itself.
"""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from changed_calls import ChangedCalls

Expect = Literal["full", "less", "any"]


@dataclass(frozen=True)
class Target:
    """A layer class; `pairs` are its sandwiches, the last one ends in the returned sum."""

    family: str
    module: str
    cls: str
    pairs: tuple[tuple[str, str], ...]


_TWO = (
    ("post_attention_layernorm", "pre_feedforward_layernorm"),
    ("post_feedforward_layernorm", ""),
)
TARGETS = (
    Target("gemma3_text", "transformers.models.gemma3.modeling_gemma3", "Gemma3DecoderLayer", _TWO),
    Target("gemma2", "transformers.models.gemma2.modeling_gemma2", "Gemma2DecoderLayer", _TWO),
    Target(
        "t5gemma",
        "transformers.models.t5gemma.modeling_t5gemma",
        "T5GemmaDecoderLayer",
        (
            ("post_self_attn_layernorm", "pre_cross_attn_layernorm"),
            ("post_cross_attn_layernorm", "pre_feedforward_layernorm"),
            ("post_feedforward_layernorm", ""),
        ),
    ),
)


@dataclass(frozen=True)
class Mutant:
    target: Target
    name: str
    expect: Expect
    source: str

    def __str__(self) -> str:
        return f"{self.target.cls}-{self.name}"

    def load(self, folder: Path) -> type[Any]:
        """The mutated class, from a file of its own so that its source can be read."""
        file = folder / "mutant.py"
        file.write_text(self.source)
        name = "gemma_fold_mutant_" + "".join(c if c.isalnum() else "_" for c in str(self))
        file = file.rename(folder / f"{name}.py")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cls: type[Any] = getattr(module, self.target.cls)
        return cls


def forward_of(target: Target) -> ast.FunctionDef:
    cls = getattr(importlib.import_module(target.module), target.cls)
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = []
    tree.returns = None
    for argument in (*tree.args.args, *tree.args.kwonlyargs, tree.args.kwarg):
        if argument is not None:
            argument.annotation = None
    return tree


def mutants(target: Target) -> list[Mutant]:
    return [
        Mutant(target, name, expect, _source(target, tree, around))
        for make in (_neutral, _renamed, _inserted, _operands, _reads, _shapes)
        for name, expect, tree, around in make(target)
    ]


_Made = Iterator[tuple[str, Expect, ast.FunctionDef, str]]


def _source(target: Target, tree: ast.FunctionDef, around: str) -> str:
    body = textwrap.indent(ast.unparse(ast.fix_missing_locations(tree)), "    ")
    decorator = "    @_decorated\n" if around else ""
    return f"""\
import functools
import logging
import {target.module} as _real

logger = logging.getLogger(__name__)
globals().update({{k: v for k, v in vars(_real).items() if not k.startswith("__")}})


def _decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper


class {target.cls}(_real.{target.cls}):
{decorator}{body}
"""


# Where things are


def _calls(node: ast.AST, attribute: str) -> bool:
    return any(
        isinstance(inner, ast.Call)
        and isinstance(inner.func, ast.Attribute)
        and inner.func.attr == attribute
        for inner in ast.walk(node)
    )


def _index(tree: ast.FunctionDef, attribute: str) -> int:
    """The statement that calls `self.attribute`."""
    return next(i for i, s in enumerate(tree.body) if _calls(s, attribute))


def _adds(tree: ast.FunctionDef) -> list[int]:
    """The statements with residual adds."""
    return [
        i
        for i, s in enumerate(tree.body)
        if isinstance(s, ast.Assign)
        and isinstance(s.value, ast.BinOp)
        and isinstance(s.value.op, ast.Add)
    ]


def _regions(target: Target, tree: ast.FunctionDef) -> list[range]:
    """Gaps between statements that lie inside a sandwich; gap i is before statement i."""
    found = []
    for post, pre in target.pairs:
        first = _index(tree, post)
        add = next(i for i in _adds(tree) if i > first)
        last = _index(tree, pre) if pre else add
        found.append(range(first + 1, last + 1))
    return found


def _add_gaps(target: Target, tree: ast.FunctionDef) -> set[int]:
    """Gaps where `hidden_states` is normed and not yet added."""
    found = set()
    for post, _ in target.pairs:
        first = _index(tree, post)
        found |= set(range(first + 1, next(i for i in _adds(tree) if i > first) + 1))
    return found


def _parsed(source: str) -> list[ast.stmt]:
    return ast.parse(source).body


def _gaps(tree: ast.FunctionDef) -> range:
    return range(len(tree.body))


# Changes


def _neutral(target: Target) -> _Made:
    yield "as it is", "full", forward_of(target), ""
    yield "decorated", "full", forward_of(target), "around"
    tree = forward_of(target)
    tree.args.kwonlyargs.append(ast.arg("added"))
    tree.args.kw_defaults.append(ast.Constant(None))
    yield "an argument by keyword", "full", tree, ""
    tree = forward_of(target)
    tree.args.args.append(ast.arg("added"))
    tree.args.defaults.append(ast.Constant(3))
    yield "an argument with a default", "full", tree, ""
    tree = forward_of(target)
    tree.body.insert(0, ast.Expr(ast.Constant("What it does.")))
    yield "a docstring", "full", tree, ""
    tree = forward_of(target)
    tree.body = [
        ast.AnnAssign(s.targets[0], ast.Name("object", ast.Load()), s.value, 1)
        if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name)
        else s
        for s in tree.body
    ]
    yield "annotated", "full", tree, ""
    tree = forward_of(target)
    tree.body = _parsed("with torch.autograd.profiler.record_function('layer'):\n    pass")
    tree.body[0].body = forward_of(target).body  # type: ignore[attr-defined]
    yield "inside a with", "full", tree, ""
    tree = forward_of(target)
    tree.body = _parsed("if True:\n    pass")
    tree.body[0].body = forward_of(target).body  # type: ignore[attr-defined]
    yield "inside an if", "full", tree, ""


class _Names(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.arg = self.names.get(node.arg, node.arg)
        return node


def _renamed(target: Target) -> _Made:
    for name in ("h", "x", "normed", "residual_", "_gemma_fold", "total", "hidden_states_2"):
        yield (
            f"hidden_states as {name}",
            "full",
            _Names({"hidden_states": name}).visit(forward_of(target)),
            "",
        )
        yield (
            f"residual as {name}",
            "full",
            _Names({"residual": name}).visit(forward_of(target)),
            "",
        )
    swapped = {"hidden_states": "residual", "residual": "hidden_states"}
    yield "names swapped", "full", _Names(swapped).visit(forward_of(target)), ""
    yield "self as layer", "full", _Names({"self": "layer"}).visit(forward_of(target)), ""
    yield "one name each", "full", _numbered(forward_of(target)), ""
    yield "one name each, decorated", "full", _numbered(forward_of(target)), "around"


def _numbered(tree: ast.FunctionDef) -> ast.FunctionDef:
    """Every assignment to a name of its own."""
    names: dict[str, str] = {}
    for number, statement in enumerate(tree.body):
        if isinstance(statement, ast.Assign):
            statement.value = _Names(names).visit(statement.value)
            new = {
                n.id: f"{n.id}_{number}"
                for target in statement.targets
                for n in ast.walk(target)
                if isinstance(n, ast.Name)
            }
            statement.targets = [_Names(new).visit(t) for t in statement.targets]
            names |= new
        else:
            _Names(names).visit(statement)
    return tree


#: Statements to put anywhere: harmless everywhere, or inside a sandwich not.
_QUIET = {
    "a log line": "logger.debug('in the middle of a layer')",
    "another variable": "unrelated = 3 * 7 + 1",
    "a flag": "is_training = self.training",
    "a log line if": "if self.training:\n    logger.debug('training')",
}
_CHANGES = {
    "hidden states in place": "hidden_states.mul_(1.5)",
    "hidden states plus in place": "hidden_states += 0.25",
    "a residual in place": "residual.add_(0.5)",
    "a call": "_observe(hidden_states)",
    "an early return": "if hidden_states.shape[1] > 3:\n    return hidden_states",
    "an early return never": "if hidden_states.shape[1] > 3000:\n    return hidden_states",
    "a loop": "for _ in range(2):\n    hidden_states = hidden_states * 1.0625",
    "a try": "try:\n    hidden_states = hidden_states * 1.0625\nfinally:\n    pass",
}
_READS = {
    "stored": "self.seen = hidden_states",
    "doubled": "twice = hidden_states * 2",
    "measured": "size = hidden_states.shape",
    "tested": "assert hidden_states is not None",
    "in a lambda": "late = lambda: hidden_states",
    "in a comprehension": "rows = [row.sum() for row in hidden_states]",
    "in a function": "def late():\n    return hidden_states",
    "in a dict": "states = {'normed': hidden_states}",
    "in a log line": "logger.debug('%s', hidden_states)",
}


def _inserted(target: Target) -> _Made:
    for name, source in _QUIET.items():
        for gap in _gaps(forward_of(target)):
            tree = forward_of(target)
            tree.body[gap:gap] = _parsed(source)
            yield f"{name} at {gap}", "full", tree, ""
    for name, source in _CHANGES.items():
        for gap in _gaps(forward_of(target)):
            tree = forward_of(target)
            inside = any(gap in region for region in _regions(target, tree))
            if "residual" in source and gap == 0:
                continue  # there is no residual yet
            expect: Expect = "less" if inside else "full"
            if gap == len(tree.body) - 1 and "hidden_states =" in source.replace("+=", "="):
                expect = "any"  # the sum is not what is returned
            tree.body[gap:gap] = _parsed(source.replace("_observe", "torch.nn.functional.relu_"))
            yield f"{name} at {gap}", expect, tree, ""
    for name, source in _READS.items():
        for gap in _gaps(forward_of(target)):
            tree = forward_of(target)
            expect = "less" if gap in _add_gaps(target, tree) else "any"
            if name in ("in a lambda", "in a function") and expect == "any":
                continue  # it may read a later value: told apart below
            tree.body[gap:gap] = _parsed(source)
            yield f"{name} at {gap}", expect, tree, ""
    for source in ("locals()", "eval('hidden_states')"):
        tree = forward_of(target)
        tree.body[0:0] = _parsed(f"every = {source}")
        yield source, "less", tree, ""


def _operands(target: Target) -> _Made:
    for number, add in enumerate(_adds(forward_of(target))):
        for name, expect, change in _ADDS:
            tree = forward_of(target)
            statement = tree.body[add]
            assert isinstance(statement, ast.Assign) and isinstance(statement.value, ast.BinOp)
            statement.value = change(statement.value)
            yield f"{name} at add {number}", expect, tree, ""


def _swapped(node: ast.BinOp) -> ast.expr:
    return ast.BinOp(node.right, ast.Add(), node.left)


def _written(form: str) -> Callable[[ast.BinOp], ast.expr]:
    """`{r}` stands for the residual, `{x}` for what is added to it."""

    def change(node: ast.BinOp) -> ast.expr:
        texts = {"r": ast.unparse(node.left), "x": ast.unparse(node.right)}
        return ast.parse(form.format(**texts), mode="eval").body

    return change


_ADDS: tuple[tuple[str, Expect, Callable[[ast.BinOp], ast.expr]], ...] = (
    ("operands swapped", "full", _swapped),
    ("a cast of the normed", "less", _written("{r} + ({x}).float()")),
    ("a cast to its own dtype", "less", _written("{r} + ({x}).to({r}.dtype)")),
    ("a cast of the sum", "any", _written("({r} + {x}).to({r}.dtype)")),
    ("a scaled residual", "any", _written("{r} * 0.5 + {x}")),
    ("a scaled normed", "less", _written("{r} + 0.5 * ({x})")),
    ("a difference", "less", _written("{r} - ({x})")),
    ("a difference the other way", "less", _written("({x}) - {r}")),
    ("a product", "less", _written("{r} * ({x})")),
    ("the normed twice", "less", _written("{r} + {x} + ({x})")),
    ("the normed without the residual", "less", _written("({x}) + ({x})")),
    ("an addition by function", "less", _written("torch.add({r}, {x}, alpha=2)")),
    ("a choice", "less", _written("{r} + {x} if self.training else {r} - {x}")),
    ("a choice of the normed", "less", _written("{r} + ({x} if self.training else 2 * {x})")),
    ("a named sum", "full", _written("(named := {r} + {x})")),
    ("a broadcast", "any", _written("{r}[:, :1] + {x}")),
)


def _reads(target: Target) -> _Made:
    for post, pre in target.pairs:
        for name, expect, form in _POSTS:
            tree = ChangedCalls(post, form).visit(forward_of(target))
            yield f"{post} {name}", expect, tree, ""
        if pre:
            for name, expect, form in _PRES:
                tree = ChangedCalls(pre, form).visit(forward_of(target))
                yield f"{pre} {name}", expect, tree, ""
        tree = forward_of(target)
        tree.body[0:0] = _parsed(f"self.{post}.eps = 0.125")
        yield f"{post} with its epsilon changed", "less", tree, ""
        tree = forward_of(target)
        tree.body[0:0] = _parsed(f"norm = self.{post}")
        tree = ChangedCalls(post, "norm({x})").visit(tree)
        yield f"{post} under another name", "less", tree, ""
        tree = ChangedCalls(post, "getattr(self, {n!r})({x})").visit(forward_of(target))
        yield f"{post} by getattr", "less", tree, ""


_POSTS: tuple[tuple[str, Expect, str], ...] = (
    ("of a scaled input", "full", "{f}({x} * 2)"),
    ("of a cast input", "any", "{f}({x}.float())"),
    ("scaled", "less", "{f}({x}) * 2"),
    ("cast", "less", "{f}({x}).float()"),
    ("cast to its own dtype", "less", "{f}({x}).to({x}.dtype)"),
    ("twice", "any", "{f}({f}({x}))"),
    ("chosen", "less", "{f}({x}) if self.training else {x}"),
    ("by its forward", "less", "{f}.forward({x})"),
    ("with its weight read", "less", "{f}({x}) + 0 * {f}.weight.sum()"),
    ("rolled", "less", "{f}({x}).roll(1, 0)"),
    ("detached", "less", "{f}({x}).detach()"),
    ("in a tuple", "less", "({f}({x}), None)[0]"),
    ("by a keyword", "less", "{f}(x={x})"),
)
_PRES: tuple[tuple[str, Expect, str], ...] = (
    ("of a cast sum", "less", "{f}({x}.float())"),
    ("of a scaled sum", "less", "{f}({x} * 2)"),
    ("of a copy", "less", "{f}({x}.clone())"),
    ("cast", "full", "{f}({x}).to({x}.dtype)"),
    ("scaled", "full", "{f}({x}) * 2"),
    ("twice", "full", "{f}({f}({x}))"),
    ("chosen", "less", "{f}({x}) if self.training else {x}"),
    ("left out", "less", "{x}"),
    ("unused", "any", "({f}({x}), {x})[1]"),
)


def _shapes(target: Target) -> _Made:
    """Statements in another order, or in one another."""
    pairs = target.pairs
    for number, (post, _) in enumerate(pairs):
        tree = forward_of(target)
        first = _index(tree, post)
        add = next(i for i in _adds(tree) if i > first)
        inlined = _Inline("hidden_states", tree.body[first].value).visit(tree.body[add])  # type: ignore[attr-defined]
        tree.body[first : add + 1] = [inlined]
        yield f"sandwich {number} in one statement", "full", tree, ""

        tree = forward_of(target)
        moved = _parsed("if self.training:\n    pass\nelse:\n    pass")
        for branch in ("body", "orelse"):
            setattr(moved[0], branch, [copy.deepcopy(tree.body[add])])
        tree.body[add : add + 1] = moved
        yield f"add {number} in both branches", "less", tree, ""

        tree = forward_of(target)
        moved = _parsed("for _ in range(2):\n    pass")
        moved[0].body = tree.body[first : add + 1]  # type: ignore[attr-defined]
        tree.body[first : add + 1] = moved
        yield f"sandwich {number} in a loop", "any", tree, ""

        tree = forward_of(target)
        tree.body[add : add + 1] = _parsed("residual += hidden_states\nhidden_states = residual")
        yield f"add {number} into the residual in place", "less", tree, ""

        tree = forward_of(target)
        tree.body[add + 1 : add + 1] = _parsed("hidden_states = hidden_states + residual")
        yield f"add {number} twice", "less", tree, ""
    # the residual taken after the norm, or never renewed
    for number, statement in enumerate(forward_of(target).body):
        if ast.unparse(statement) != "residual = hidden_states":
            continue
        tree = forward_of(target)
        tree.body[number], tree.body[number + 1] = tree.body[number + 1], tree.body[number]
        yield f"residual {number} taken after the norm", "full", tree, ""
        tree = forward_of(target)
        saved = _parsed("before = hidden_states")
        later = _parsed("residual = before")
        tree.body[number : number + 2] = [*saved, tree.body[number + 1], *later]
        yield f"residual {number} by way of another name", "full", tree, ""
        if number:
            tree = forward_of(target)
            tree.body[number] = _parsed("pass")[0]
            yield f"residual {number} never renewed", "full", tree, ""


class _Inline(ast.NodeTransformer):
    def __init__(self, name: str, value: ast.expr) -> None:
        self.name, self.value = name, value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        loads = isinstance(node.ctx, ast.Load) and node.id == self.name
        return copy.deepcopy(self.value) if loads else node
