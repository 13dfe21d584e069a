"""safetensors headers: read, validate, write.

A safetensors file is an 8-byte little-endian length N, N bytes of JSON, then the data section.
The JSON maps each tensor's name to its dtype, shape and byte range within the data section, and
`__metadata__` to a map of strings. The ranges must tile the data section exactly: no overlap, no
hole, nothing left over (https://github.com/huggingface/safetensors#format).

Everything accepted here is accepted by the safetensors library. The reverse does not hold for four
things no writer produces: a leading space, duplicate keys it happens to tolerate, an entry or a
dtype spelled in one of serde's alternative forms, and an integer beyond 64 bits in an unknown key.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

from gemma_fold.checkpoint.fields import Refused, unique
from gemma_fold.checkpoint.names import shown
from gemma_fold.checkpoint.regular import open_regular
from gemma_fold.errors import CheckpointError

MAX_HEADER_SIZE = 100_000_000
"""Bytes; the safetensors library refuses larger headers."""

_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

ITEMSIZE: dict[str, int | Fraction] = {
    name: bits // 8 if bits % 8 == 0 else Fraction(bits, 8) for name, bits in _BITS.items()
}
"""Bytes per element by dtype name; a fraction for the sub-byte dtypes."""

_U64_MAX = 2**64 - 1
_MAX_DEPTH = 124  # the library's JSON parser stops at this depth inside an unknown key's value
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_LFS_POINTER = b"version "


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header: `start` and `end` are byte offsets into the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A validated header.

    Attributes:
        raw: the JSON bytes as they are on disk, padding included, without the 8-byte length.
        tensors: entries by name, in header order (which need not be offset order).
        metadata: the `__metadata__` map, or None when the header has none.
        data_start: file offset of the data section, `8 + len(raw)`.
        data_size: bytes in the data section.
    """

    raw: bytes
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] | None
    data_start: int
    data_size: int


def parse_header(raw: bytes, *, data_size: int | None, where: str) -> Header:
    """Validate the JSON part of a safetensors file.

    Args:
        raw: the header without its 8-byte length.
        data_size: bytes that follow the header, checked against the ranges; None when unknown.
        where: the file's name for error messages.

    Raises:
        CheckpointError: the header breaks the format in any way.
    """
    try:
        document = _decode(raw)
        metadata = _metadata(document.pop("__metadata__", None))
        tensors = {name: _entry(name, value) for name, value in document.items()}
        size = _check_tiling(tensors.values())
        if data_size is not None and data_size != size:
            _reject_size(size, data_size)
    except Refused as error:
        raise CheckpointError(
            f"{where}: damaged safetensors header: {error}; fetch the file again"
        ) from None
    return Header(raw, tensors, metadata, 8 + len(raw), size)


def read_header(path: Path) -> Header:
    """Read and validate the header of a local file; the tensor data is not touched.

    Raises:
        CheckpointError: the file is missing, or not a valid safetensors file.
        HostError: the file exists but the system does not let us read it.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        raw = _read_raw(file.fileno(), size, str(path))
    return parse_header(raw, data_size=size - 8 - len(raw), where=str(path))


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Decode and check a file's first 8 bytes.

    Args:
        prefix: the first 8 bytes, or fewer if the file is shorter.
        file_size: bytes in the whole file.
        where: the file's name for error messages.

    Raises:
        CheckpointError: the file is too short, or does not start as a safetensors file does.
    """
    if prefix.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{where}: a Git LFS pointer, not the weights; run `git lfs pull` in that folder"
        )
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8:
        problem = f"only {len(prefix)} bytes long, too short for a safetensors file"
    elif length > MAX_HEADER_SIZE:
        problem = f"its header would have {length} bytes, over the format's {MAX_HEADER_SIZE}"
    elif length > file_size - 8:
        problem = f"its header would have {length} bytes, but the file has only {file_size}"
    else:
        return length
    raise CheckpointError(
        f"{where}: {problem}; not a safetensors file, or truncated: fetch it again"
    )


def with_length(raw: bytes) -> bytes:
    """What a file begins with: a header behind the 8 bytes of its length."""
    return len(raw).to_bytes(8, "little") + raw


def render_header(tensors: Iterable[TensorEntry], metadata: Mapping[str, str] | None) -> bytes:
    """The JSON of a header in the given order, padded with spaces to a multiple of 8 bytes.

    Raises:
        CheckpointError: the header would be larger than the format allows.
    """
    document: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for tensor in tensors:
        document[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (tensor.start, tensor.end),
        }
    raw = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_SIZE:
        raise CheckpointError(
            f"a header of {len(raw)} bytes is over the format's {MAX_HEADER_SIZE}; "
            "spread the tensors over more shards"
        )
    return raw


def _read_raw(fd: int, file_size: int, where: str) -> bytes:
    length = header_length(os.pread(fd, 8, 0), file_size, where)
    raw = b""
    while len(raw) < length:
        piece = os.pread(fd, length - len(raw), 8 + len(raw))
        if not piece:
            raise CheckpointError(f"{where}: shrank while it was read; let its writer finish")
        raw += piece
    return raw


def _decode(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_HEADER_SIZE:
        raise Refused(f"{len(raw)} bytes, over the format's {MAX_HEADER_SIZE}")
    if not raw.startswith(b"{"):
        raise Refused('does not start with "{"')
    try:
        document: dict[str, Any] = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
        if rb"\ud" in raw or rb"\uD" in raw:
            # Python lets an escaped lone surrogate through; it is not text, and UTF-8 refuses it.
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise Refused(f"not UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise Refused(f"not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise Refused("nested too deeply") from None
    return document


def _integer(text: str) -> int | float:
    if text == "-0":
        return -0.0  # as the library reads it, and then refuses it as a size
    # Longer texts are not converted: quadratic time, and past 4300 digits an exception.
    if len(text) > 20 or (value := int(text)) > _U64_MAX:
        raise Refused(f"the integer {text[:24]} does not fit in 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0.0:
        raise Refused(f"the number {text[:24]} is out of range")
    return value


def _no_constant(text: str) -> NoReturn:
    raise Refused(f"not JSON ({text})")


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if type(value) is not dict:
        raise Refused("__metadata__ is not a map")
    for key, text in value.items():
        if type(text) is not str:
            raise Refused(f"__metadata__ {shown(key)} is not a string")
    return value


def _entry(name: str, value: Any) -> TensorEntry:
    if type(value) is not dict:
        raise Refused(f"tensor {shown(name)} is not described by a map")
    try:
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    except KeyError as error:
        raise Refused(f"tensor {shown(name)} has no {error.args[0]}") from None
    if len(value) > 3:
        _check_extra(name, value)
    bits = _BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        raise Refused(f"tensor {shown(name)} has the unknown dtype {shown(dtype)}")
    size = _byte_size(name, bits, shape)
    if not _are_offsets(offsets):
        raise Refused(
            f"tensor {shown(name)} has the data_offsets {shown(offsets)}, not a begin and an end"
        )
    start, end = offsets
    if end - start != size:
        raise Refused(
            f"tensor {shown(name)} of {dtype} {shown(shape)} needs {size} bytes, has {end - start}"
        )
    return TensorEntry(name, dtype, tuple(shape), start, end)


def _are_offsets(value: Any) -> bool:
    if type(value) is not list or len(value) != 2:
        return False
    start, end = value
    # By exact type, since True would pass as an int.
    return type(start) is int and type(end) is int and start >= 0 and end >= 0


def _byte_size(name: str, bits: int, shape: Any) -> int:
    if type(shape) is not list:
        raise Refused(f"tensor {shown(name)} has the shape {shown(shape)}, not a list of sizes")
    total = 1
    for size in shape:
        if type(size) is not int or size < 0:
            raise Refused(f"tensor {shown(name)} has the shape {shown(shape)}, not a list of sizes")
        total *= size
        # At every step, as the library does: a later 0 does not make an overflow right.
        if total > _U64_MAX:
            raise Refused(
                f"tensor {shown(name)} has the shape {shown(shape)}, over 64 bits of size"
            )
    total *= bits
    if total > _U64_MAX:
        raise Refused(f"tensor {shown(name)} has the shape {shown(shape)}, over 64 bits of size")
    if total % 8:
        raise Refused(f"tensor {shown(name)} of {bits}-bit elements ends inside a byte")
    return total // 8


def _check_extra(name: str, value: dict[str, Any]) -> None:
    """Unknown keys are let through, as the library does, down to the depth it reads."""
    level = [item for key, item in value.items() if key not in _ENTRY_KEYS]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise Refused(f"tensor {shown(name)} is described by a map nested too deeply")


def _check_tiling(tensors: Iterable[TensorEntry]) -> int:
    """The size of the data section that the ranges tile, in bytes."""
    position = 0
    for tensor in sorted(tensors, key=attrgetter("start", "end")):
        if tensor.start < position:
            raise Refused(f"tensor {shown(tensor.name)} overlaps the one before it")
        if tensor.start > position:
            raise Refused(
                f"{tensor.start - position} bytes before tensor {shown(tensor.name)} unused"
            )
        position = tensor.end
    return position


def _reject_size(described: int, present: int) -> NoReturn:
    if present < described:
        raise Refused(f"the file is truncated: {described - present} bytes of data are missing")
    raise Refused(f"{present - described} bytes of data after the last tensor")
