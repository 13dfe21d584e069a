"""Whether the parts of a manifest fit together: what `verify` and `unfold` rely on unasked."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_fold.checkpoint.fields import parse_json_object
from gemma_fold.checkpoint.header import Header, parse_header
from gemma_fold.checkpoint.names import check_top_name, shown
from gemma_fold.checkpoint.source import CONFIG, INDEX_SUFFIX, check_config, index_map
from gemma_fold.errors import CheckpointError
from gemma_fold.format.names import MANIFEST

if TYPE_CHECKING:
    from gemma_fold.format.manifest import Manifest, SourceFile


def check_consistent(manifest: Manifest, where: Path | str) -> None:
    """CheckpointError unless every part of `manifest`, found in the file `where`, fits the others.

    The recorded config, index and headers are valid themselves, paths do not collide, and each
    folded tensor is in the original header of its file with the dtype and shape that it names.
    """
    config = parse_json_object(manifest.config.encode(), f"config of {where}")
    check_config(config, f"config of {where}")
    _check_index(manifest, where)
    _check_paths(manifest, where)
    headers = {
        name: _header(file, where)
        for name, file in manifest.files.items()
        if file.header is not None
    }
    for name, tensor in manifest.tensors.items():
        header = headers.get(tensor.file)
        entry = header.tensors.get(name) if header else None
        if entry is None or (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
            found = f"{entry.dtype} {list(entry.shape)}" if entry else "nothing"
            raise _damaged(
                f"tensor {shown(name)} is {tensor.dtype} {list(tensor.shape)}, but the header of "
                f"{shown(tensor.file)} says {found}",
                where,
            )


def _check_index(manifest: Manifest, where: Path | str) -> None:
    name, index = manifest.index_name, manifest.index
    if name is None and index is None:
        return
    if name is None or index is None:
        raise _damaged("one of index and index_name is missing", where)
    check_top_name(name, where)
    if not name.endswith(INDEX_SUFFIX) or name not in manifest.files:
        raise _damaged(f"index_name {shown(name)} is no weight index among its files", where)
    index_map(index.encode(), f"index of {where}")


def _check_paths(manifest: Manifest, where: Path | str) -> None:
    if CONFIG not in manifest.files:
        raise _damaged(f"files has no {CONFIG}", where)
    if MANIFEST in manifest.files:
        raise _damaged(f"files has {MANIFEST}, which no original has", where)
    # NUL sorts before whatever a name may hold, so a folder comes right before what is in it.
    ordered = sorted(
        [(name.replace("/", "\0"), True) for name in manifest.files]
        + [(name.replace("/", "\0"), False) for name in manifest.directories]
    )
    for (name, is_file), (after, also_file) in itertools.pairwise(ordered):
        inside = is_file and after.startswith(name + "\0")
        if inside or (name == after and is_file != also_file):
            raise _damaged(f"{shown(name.replace(chr(0), '/'))} is both a file and a folder", where)


def _header(file: SourceFile, where: Path | str) -> Header:
    """The original header of a weight file, checked against the file's size."""
    assert file.header is not None
    check_top_name(file.name, where)
    raw = file.header.encode()
    return parse_header(
        raw, data_size=file.size - 8 - len(raw), where=f"header of {file.name} in {where}"
    )


def _damaged(problem: str, where: Path | str) -> CheckpointError:
    return CheckpointError(f"{where} is damaged: {problem}; fold the original again")
