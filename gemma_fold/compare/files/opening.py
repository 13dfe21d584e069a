"""What a path or Hub id is, and its norms."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from gemma_fold.checkpoint.names import shown
from gemma_fold.checkpoint.regular import open_regular
from gemma_fold.checkpoint.source import CONFIG
from gemma_fold.compare.files.folders import open_folder
from gemma_fold.compare.files.gguf import MAGIC, GgufTensor, read_gguf, read_tensor
from gemma_fold.compare.files.gguf_names import (
    ARCHITECTURES,
    config_of,
    is_converted,
    transformers_name,
)
from gemma_fold.compare.files.model import NormFile, Tensor
from gemma_fold.errors import CheckpointError, UnsupportedModelError


def open_file(source: str) -> NormFile:
    """A GGUF file, a folder of any kind, or a Hub id; no tensor is read yet.

    Raises:
        CheckpointError: damaged, incomplete, or none of these.
        UnsupportedModelError: a GGUF file of an architecture whose names are not known.
        HostError: the Hub cannot be reached.
    """
    path = Path(source)
    if not is_gguf(source):
        return open_folder(source)
    if not path.is_dir():
        return _open_gguf(source, path)
    found = _models(path)
    if len(found) > 1:
        raise CheckpointError(f"{path} holds {len(found)} GGUF files; give the one to check")
    return _open_gguf(source, found[0])


def is_gguf(source: str) -> bool:
    """Whether it is such a file by its name or its first bytes, or a folder of nothing else."""
    path = Path(source)
    if path.is_dir():
        return not (path / CONFIG).exists() and bool(_models(path))
    if path.suffix == ".gguf":
        return path.exists()
    if not path.is_file():
        return False
    with open_regular(path) as file:
        return file.read(4) == MAGIC


def have_only_norms_in_common(a: NormFile, b: NormFile) -> bool:
    """Whether two files are of formats or tools that name and store all but the norms differently.

    A folded checkpoint and its original have everything else in common, as have two files of one
    tool.
    """
    kinds = {
        ("safetensors", "") if file.format == "folded" else (file.format, file.tool)
        for file in (a, b)
    }
    return len(kinds) > 1 or "gguf" in {form for form, _ in kinds}


def _models(folder: Path) -> list[Path]:
    """The GGUF files of a folder, of split ones the first part."""
    found = sorted(folder.glob("*.gguf"))
    return [p for p in found if "-of-" not in p.name or "-00001-of-" in p.name]


def _open_gguf(source: str, path: Path) -> NormFile:
    found = read_gguf(path)
    name = found.values.get("general.architecture")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if isinstance(name, str) and not is_converted(name):
        raise UnsupportedModelError(
            f"{path} is a GGUF file of architecture {shown(name)}, which llama.cpp's converter "
            "does not know, so nothing says what its norms should hold; compare single norms with "
            "--tensor NAME=FILE.npy"
        )
    if architecture is None or not isinstance(name, str):
        raise UnsupportedModelError(
            f"{path} is a GGUF file of architecture {shown(name)}, whose norms no table names; "
            "add it to gemma_fold/compare/files/gguf_names.py"
        )
    places: dict[str, GgufTensor] = {}
    for tensor in found.tensors:
        known = transformers_name(tensor.name, architecture, name, found.values)
        if known is None:
            continue
        if known in places:
            raise CheckpointError(
                f"{path} holds {places[known].name} and {tensor.name}, which are one norm; "
                "fetch the file again"
            )
        places[known] = tensor

    def read(names: Collection[str]) -> Mapping[str, bytes]:
        return {n: read_tensor(places[n]) for n in names}

    return NormFile(
        name=source,
        format="gguf",
        tool="llama.cpp",
        config=config_of(architecture, name, found.values),
        tensors={
            known: Tensor(t.name, t.dtype or f"ggml type {t.type_id}", t.size)
            for known, t in places.items()
        },
        read=read,
        size=found.size,
        header_bytes=found.read,
    )
