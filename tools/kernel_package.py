"""Build the package of norm kernels that the library `kernels` loads, from the sources here.

    python tools/kernel_package.py --out build/kernels

FOLDER/build/torch-cuda and FOLDER/build/torch-cpu hold `tools/hub_kernel` and what it imports of
gemma_fold.ops, with relative imports and a torch.ops namespace that is the hash of those files: two
versions can be loaded into one process. The same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "gemma-fold-norms"
#: The branch it is published to is v<this>; raised when a name goes or changes its meaning.
VERSION = 1
BACKENDS = ("cpu", "cuda")
#: Packages whose modules become one package, and where they are.
HOMES = {"gemma_fold.ops": ROOT / "gemma_fold" / "ops", "hub_kernel": ROOT / "tools" / "hub_kernel"}
_NAMESPACE = 'NAMESPACE = "gemma_fold"\n'


class PackageError(Exception):
    """The sources cannot be packaged; the message says which and why."""


def imports(source: str) -> Iterator[ast.ImportFrom]:
    """Every import of ours in `source`, those in functions and for type checkers too.

    Raises:
        PackageError: one that cannot be made relative.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        if not any(name.split(".")[0] in ("gemma_fold", "hub_kernel") for name in names):
            continue
        if isinstance(node, ast.Import) or home_of(names[0]) is None:
            raise PackageError(f"line {node.lineno}: {ast.unparse(node)} leads out of the package")
        yield node


def home_of(module: str) -> str | None:
    """The package of ours that `module` is in."""
    return next((home for home in HOMES if f"{module}.".startswith(f"{home}.")), None)


def path_of(module: str) -> Path | None:
    """The file of a module of ours; None for a package's name or one that is no module."""
    home = home_of(module)
    if home is None:
        return None
    path = HOMES[home].joinpath(*module.removeprefix(home).split(".")[1:]).with_suffix(".py")
    return path if path.is_file() else None


def relative(source: str, depth: int) -> str:
    """`source` of a module so many folders down, with relative imports."""
    lines = source.splitlines(keepends=True)
    for node in imports(source):
        home = home_of(node.module or "")
        assert node.module is not None and home is not None
        line = lines[node.lineno - 1]
        dots = "." * (depth + 1)
        within = node.module.removeprefix(home).removeprefix(".")
        lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {dots}{within} ", 1)
    return "".join(lines)


def sources() -> dict[str, str]:
    """The package's modules by path: what `hub_kernel` imports, and so on."""
    found: dict[str, str] = {}
    waiting = [HOMES["hub_kernel"] / "__init__.py"]
    while waiting:
        path = waiting.pop()
        home = next(folder for folder in HOMES.values() if path.is_relative_to(folder))
        name = path.relative_to(home)
        if str(name) in found:
            continue
        source = path.read_text("utf-8")
        found[str(name)] = relative(source, len(name.parts) - 1)
        if len(name.parts) > 1:
            waiting.append(path.with_name("__init__.py"))
        for node in imports(source):
            module = node.module or ""
            for known in (module, *(f"{module}.{alias.name}" for alias in node.names)):
                target = path_of(known)
                if target is not None:
                    waiting.append(target)
    return dict(sorted(found.items()))


def identity(files: dict[str, str]) -> str:
    """A name for exactly these files."""
    text = json.dumps(files, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def metadata(name: str, backend: str, files: dict[str, str]) -> str:
    """`metadata.json` of a variant."""
    digests = {
        path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for path, text in sorted(files.items())
    }
    data = {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return json.dumps(data, indent=2) + "\n"


def package() -> dict[str, str]:
    """Every file of the package, by path.

    Raises:
        PackageError: the sources cannot be packaged.
    """
    modules = sources()
    base = modules["operators/base.py"]
    if base.count(_NAMESPACE) != 1:
        raise PackageError(f"operators/base.py does not say {_NAMESPACE.strip()} once")
    licence = (ROOT / "LICENSE").read_text("utf-8")
    card = (HOMES["hub_kernel"] / "CARD.md").read_text("utf-8")
    # The second is where `kernel-builder upload` looks for it.
    files = {"LICENSE": licence, "README.md": card, "build/CARD.md": card}
    for backend in BACKENDS:
        name = f"_{NAME.replace('-', '_')}_{backend}_{identity(modules)}"
        named = base.replace(_NAMESPACE, f'NAMESPACE = "{name}"\n')
        variant = {**modules, "operators/base.py": named, "LICENSE": licence}
        variant["metadata.json"] = metadata(name, backend, variant)
        files.update({f"build/torch-{backend}/{path}": text for path, text in variant.items()})
    return files


def write(out: Path) -> int:
    """Write the package into a new folder; returns how many files it has.

    Raises:
        PackageError: the folder is not empty, or the sources cannot be packaged.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise PackageError(f"{out} is not an empty folder; name another, or move it away")
    files = package()
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.with_name(out.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    for path, text in files.items():
        target = building / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8", newline="\n")
    building.replace(out)
    return len(files)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    out: Path = parser.parse_args(arguments).out
    try:
        count = write(out)
    except (PackageError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{out}: {count} files of {NAME}, version {VERSION}, for {' and '.join(BACKENDS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
