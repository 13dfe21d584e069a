"""Single tensors from NumPy's .npy files or standard input: for authors of runtimes."""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gemma_fold.checkpoint.regular import open_regular
from gemma_fold.compare.files.model import MOST_BYTES, NormFile, Tensor
from gemma_fold.errors import CheckpointError, UsageError

_DTYPES = {"<f2": "F16", "<f4": "F32", "<f8": "F64", "<u2": "BF16", "|V2": "BF16"}


def open_arrays(given: Collection[str]) -> NormFile:
    """Read every `NAME=FILE.npy`; FILE is - for standard input.

    bfloat16, which NumPy lacks, is taken from arrays of 16-bit integers or of ml_dtypes.

    Raises:
        UsageError: an argument of another form, a name twice, or standard input twice.
        CheckpointError: a file that is not a one-dimensional array of floats.
    """
    raw: dict[str, bytes] = {}
    tensors: dict[str, Tensor] = {}
    if sum(argument.endswith("=-") for argument in given) > 1:
        raise UsageError("standard input holds one tensor; give the others as files")
    for argument in given:
        name, equals, place = argument.partition("=")
        if not equals or not name or not place:
            raise UsageError(f"--tensor {argument} is not NAME=FILE.npy")
        if name in tensors:
            raise UsageError(f"--tensor names {name} twice")
        array = _load(place)
        raw[name] = array.tobytes()
        tensors[name] = Tensor(name, _DTYPES[array.dtype.str], array.size)

    def read(names: Collection[str]) -> Mapping[str, bytes]:
        return {name: raw[name] for name in names}

    size = sum(map(len, raw.values()))
    label = f"{len(tensors)} tensor{'s'[: len(tensors) != 1]}"
    return NormFile(label, "tensors", "arrays", {}, tensors, read, size, 0)


def _load(place: str) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
    """A one-dimensional array in one of the dtypes above."""
    if place == "-":
        return _parse(sys.stdin.buffer, "standard input")
    with open_regular(Path(place)) as file:
        return _parse(file, place)


def _parse(file: BinaryIO, where: str) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
    raw = file.read(MOST_BYTES + 1) or b""
    if len(raw) > MOST_BYTES:
        raise CheckpointError(f"{where} is larger than any norm; give one tensor")
    try:
        array = np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
    except Exception:
        # numpy raises whatever its parser of literals does, on bytes that anyone may have written.
        raise CheckpointError(
            f"{where} is no .npy file of plain numbers; write it with numpy.save"
        ) from None
    array = np.squeeze(array)
    if array.dtype.str not in _DTYPES or array.ndim != 1:
        raise CheckpointError(
            f"{where} holds {array.dtype} {list(array.shape)}; a norm is one row of floats"
        )
    return array
