"""Modules of gemma-fold import each other in one direction, whenever the import runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import gemma_fold

assert gemma_fold.__file__ is not None
ROOT = Path(gemma_fold.__file__).parent


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text("utf-8"))
    return found


def imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import below `node`, those in functions too, but not those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from imports(child)


def targets(statement: ast.Import | ast.ImportFrom, known: set[str]) -> set[str]:
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names} & known
    module = statement.module or ""
    found = set()
    for alias in statement.names:
        name = f"{module}.{alias.name}"
        found.add(name if name in known else module)
    return found & known


def test_no_import_goes_in_a_circle() -> None:
    trees = modules()
    known = set(trees)
    assert len(known) > 100
    graph = {
        name: {t for s in imports(tree) for t in targets(s, known)} - {name}
        for name, tree in trees.items()
    }
    assert "gemma_fold.format.manifest" in graph["gemma_fold.commands.verify"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def wing_of(module: str) -> str:
    return [*module.split("."), ""][1]


#: What each wing may import beside itself and the modules at the top. The
#: names of format 1 lie below all of them.
BELOW: dict[str, set[str]] = {
    "rules": set(),
    "checkpoint": set(),
    "format": {"checkpoint", "rules"},
    "ops": set(),
    "commands": {"checkpoint", "compare", "format", "rules"},
    "engines": {"checkpoint", "format", "ops", "rules"},
    "compare": {"checkpoint", "engines", "format", "rules"},
}


def test_wings_know_only_what_is_below_them() -> None:
    trees = modules()
    for name, tree in trees.items():
        wing = wing_of(name)
        for statement in imports(tree):
            for target in targets(statement, set(trees)):
                other = wing_of(target)
                if target == "gemma_fold.format.names":
                    continue
                if wing in BELOW and other in BELOW and other != wing:
                    assert other in BELOW[wing], f"{name} imports {target}"
