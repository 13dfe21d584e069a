"""Find by reading, in Python source that need not run, what adds a number to a norm's weight.

A function adds where it sums a weight (a name or attribute `weight` or `gamma`, or what was made of
one) and a number, or something called an offset. Handing such a number to a kernel
(`weight_bias=1.0`), calling a kernel named after Gemma's norm, and a loader that adds count too. A
class adds if one of its methods does, if its base class does, or,
for a norm, if it calls a function that does. Names are followed through imports and aliases.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_WEIGHT = re.compile(r"(^|_)(weight|gamma)$")
_OFFSET = re.compile(r"offset|gain_center")
_KEYWORD = re.compile(r"^(norm_)?weight_(bias|offset)$|^gain_center$")
_INSIDE = re.compile(r"\bself\.(text|llm|language)_config\b|\bCONFIG_MAPPING\[")
_KERNEL = re.compile(r"gemma_\w*norm(?!_weight)")
#: A file without any of these adds nothing.
_MAYBE = re.compile(
    r"\+=?\s*(\d|self\.|\w*offset)|\b1(\.0)?\s*\+|\.add_?\(|_bias=|_offset=|center=|gemma_\w*norm"
)
#: Smaller numbers keep a division from failing; no norm is centred on them.
_LEAST = 0.01
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """A class or function, and the file that defines it."""

    file: str
    name: str


@dataclass(frozen=True)
class _File:
    """One file, parsed when something in it is asked for."""

    path: str
    text: str

    @cached_property
    def definitions(self) -> dict[str, _Definition]:
        tree = self._tree
        classes = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
        return classes | {n.name: n for n in tree.body if isinstance(n, _Function)}

    @cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        """Local name -> the module it comes from, dots for those above, and its name there."""
        return {
            alias.asname or alias.name: ("." * node.level + (node.module or ""), alias.name)
            for node in ast.walk(self._tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    @cached_property
    def names(self) -> set[str]:
        """Every name that the file reads."""
        return _names(self._tree)

    @cached_property
    def _tree(self) -> ast.Module:
        try:
            return ast.parse(self.text)
        except SyntaxError:
            return ast.Module(body=[], type_ignores=[])


class Source:
    """The Python source of an installed or unpacked package.

    Attributes:
        adders: what adds to a weight, with the line.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files = {
            path: _File(path, (root / path).read_text("utf-8", "replace"))
            for path in sorted(str(p.relative_to(root)) for p in root.rglob("*.py"))
        }
        self.adders: dict[Name, int] = {}
        self._words: set[str] = set()  # the names of adders, and what imports call them
        for file in self._files.values():
            if _MAYBE.search(file.text):
                for name, body in file.definitions.items():
                    if line := _adds(body):
                        self.adders[Name(file.path, name)] = line
        self._spread()

    def files(self, under: Iterable[str]) -> list[_File]:
        """The files of these folders."""
        return [f for f in self._files.values() if f.path.startswith(tuple(under))]

    def users(self, under: Iterable[str]) -> dict[str, list[str]]:
        """Files of the folders `under` that add to a weight, or build on a class of one that does.

        Each with the names that make it one: adders that it defines or imports and uses, or the
        classes that it imports from another of these files.
        """
        folders = tuple(under)
        found = {
            file.path: {name.name for name in self._referred(file, file.names)}
            | {adder.name for adder in self.adders if adder.file == file.path}
            for file in self._mentioning()
            if file.path.startswith(folders)
        }
        found = {path: names for path, names in found.items() if names}
        before = -1
        while len(found) != before:
            before = len(found)
            for file in self.files(folders):
                if file.path not in found and (classes := self._classes_of(file, found)):
                    found[file.path] = classes
        return {path: sorted(names) for path, names in sorted(found.items())}

    def _classes_of(self, file: _File, others: Iterable[str]) -> set[str]:
        """Classes that `file` imports from one of the others."""
        came = {self._resolved(file.path, local) for local in file.imports}
        return {
            name.name
            for name in came
            if name.file in others
            and isinstance(self._files[name.file].definitions.get(name.name), ast.ClassDef)
        }

    def _spread(self) -> None:
        """Add classes that inherit from what adds, and norms that call it."""
        before = -1
        while len(self.adders) + len(self._words) != before:
            before = len(self.adders) + len(self._words)
            self._words |= {adder.name for adder in self.adders}
            for file in self._mentioning():
                imported = self._referred(file, set(file.imports))
                self._words |= {n for n in file.imports if self._resolved(file.path, n) in imported}
                for key, body in file.definitions.items():
                    name = Name(file.path, key)
                    if isinstance(body, ast.ClassDef) and name not in self.adders:
                        wanted = {n for base in body.bases for n in _names(base)}
                        if re.search("norm", key, re.IGNORECASE):
                            wanted |= _names(body)
                        if self._referred(file, wanted):
                            self.adders[name] = body.lineno

    def _mentioning(self) -> list[_File]:
        """The files that have one of `_words` in them."""
        words = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(self._words)))})\b")
        return [file for file in self._files.values() if self._words and words.search(file.text)]

    def _referred(self, file: _File, names: set[str]) -> set[Name]:
        """Of `names`, as `file` knows them, those of adders."""
        return {self._resolved(file.path, local) for local in names} & set(self.adders)

    def _resolved(self, path: str, local: str, depth: int = 0) -> Name:
        """Where a name of a file is defined; the file itself where that cannot be followed."""
        file = self._files[path]
        if local in file.definitions or local not in file.imports or depth > 5:
            return Name(path, local)
        module, name = file.imports[local]
        target = self._module(path, module)
        return self._resolved(target, name, depth + 1) if target else Name(path, local)

    def _module(self, path: str, module: str) -> str | None:
        """The file of a module that `path` imports from."""
        above = len(module) - len(module.lstrip("."))
        if above:
            parts = [*Path(path).parts[:-above], *module.lstrip(".").split(".")]
        else:
            first, *parts = module.split(".")
            if first != self.root.name:
                return None
        place = "/".join(part for part in parts if part)
        found = (f"{place}.py", f"{place}/__init__.py")
        return next((file for file in found if file in self._files), None)


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _adds(body: ast.AST) -> int:
    """The line where a weight and a number are summed, or handed to what does; 0 if nowhere."""
    made = _made_of_weights(body)
    for node in ast.walk(body):
        pairs: list[tuple[ast.AST, ast.AST]] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            pairs = [(node.left, node.right), (node.right, node.left)]
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
            pairs = [(node.target, node.value)]
        elif isinstance(node, ast.Call):
            if _is_told_to_add(node):
                return node.lineno
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr in ("add", "add_") and node.args:
                pairs = [(called.value, node.args[0])]
        if any(_is_weight(one, made) and _is_number(two) for one, two in pairs):
            return int(getattr(node, "lineno", 0))
    return 0


def _is_told_to_add(call: ast.Call) -> bool:
    """Whether what is called adds: by the number it is given, by its name, or as a loader."""
    if any(k.arg and _KEYWORD.match(k.arg) and not _zero(k.value) for k in call.keywords):
        return True
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if _KERNEL.search(name):
        return True
    return "weight_loader" in name and any(
        isinstance(each, ast.Lambda)
        and isinstance(each.body, ast.BinOp)
        and isinstance(each.body.op, ast.Add)
        for each in call.args
    )


def _made_of_weights(body: ast.AST) -> set[str]:
    """Names that hold a weight, or what a method such as `.float()` made of one."""
    names: set[str] = set()
    for node in ast.walk(body):
        if isinstance(node, ast.Assign) and _is_weight(node.value, names):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return names


def _is_weight(node: ast.AST, made: set[str]) -> bool:
    while isinstance(node, ast.Call | ast.Subscript):
        if isinstance(node, ast.Subscript):
            node = node.value
        elif isinstance(node.func, ast.Attribute) and node.func.attr not in ("size", "stride"):
            node = node.func.value  # weight.float(), weight.to(dtype)
        else:
            return False
    if isinstance(node, ast.Attribute) and node.attr == "data":
        node = node.value
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name in made or _WEIGHT.search(name) is not None


def _is_number(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        value = node.value
        return isinstance(value, int | float) and value is not True and abs(value) >= _LEAST
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return _OFFSET.search(name) is not None


def _zero(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and not node.value


def model_types(source: Source, under: Iterable[str]) -> dict[str, str]:
    """Model types that the config classes of the folders `under` are of -> where each says so."""
    return {
        kind: f"{file.path}:{line.lineno}"
        for file in source.files(under)
        for body in file.definitions.values()
        for kind, line in _model_types(body)
    }


def wrappers(source: Source, under: Iterable[str]) -> set[str]:
    """Those of `model_types` whose config class speaks of the config of a language model inside."""
    return {
        kind
        for file in source.files(under)
        for body in file.definitions.values()
        for kind, _ in _model_types(body)
        if _INSIDE.search(ast.unparse(body))
    }


def _model_types(body: _Definition) -> Iterator[tuple[str, ast.stmt]]:
    """The model type that a class says it is of, and the line."""
    for line in body.body if isinstance(body, ast.ClassDef) else ():
        if (
            isinstance(line, ast.Assign | ast.AnnAssign)
            and isinstance(line.value, ast.Constant)
            and isinstance(line.value.value, str)
            and "model_type" in {getattr(t, "id", "") for t in _targets(line)}
        ):
            yield line.value.value, line


def _targets(line: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return line.targets if isinstance(line, ast.Assign) else [line.target]
