"""GGUF headers: which one-dimensional tensors a file holds and where, in bounded memory and time.

A file is the magic and a version, two counts, as many keys with values, as many descriptions of
tensors, and, aligned, the tensors (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The
keys hold the whole vocabulary, which is stepped over. The `gguf` package reads the same, but builds
an object for each of its entries, which takes seconds and trusts every count in the file.
"""

from __future__ import annotations

import os
import re
import struct
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from gemma_fold.checkpoint.header import ITEMSIZE
from gemma_fold.checkpoint.names import shown
from gemma_fold.checkpoint.regular import open_regular, read_range
from gemma_fold.compare.files.model import MOST_BYTES
from gemma_fold.errors import CheckpointError

MAGIC = b"GGUF"
_BLOCK = 1 << 20
_MOST_KEYS = 1 << 16
_MOST_TENSORS = 1 << 17
_MOST_STRINGS = 1 << 23
_MOST_NESTING = 4
_LONGEST_NAME = 512
_LONGEST_VALUE = 256

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"} | {
    12: "d"
}
#: Types a norm can be compared in, as safetensors calls them.
_FLOATS = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
_KEPT = re.compile(
    r"general\.(?:architecture|alignment)|[\w-]+\.(?:block_count|nextn_predict_layers)"
)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

Value = int | float | bool | str
#: A tensor in the header: name, shape, type, and offset from the first one's place.
_Row = tuple[str, tuple[int, ...], int, int]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A one-dimensional tensor: `dtype` is None where it is quantized, `start` a file offset."""

    name: str
    dtype: str | None
    type_id: int
    size: int
    path: Path
    start: int

    @property
    def length(self) -> int:
        """Bytes."""
        return 0 if self.dtype is None else self.size * int(ITEMSIZE[self.dtype])


@dataclass(frozen=True, slots=True)
class Gguf:
    """The header of a GGUF file, or of all parts of a split one.

    Attributes:
        values: the keys that say which model it is and of how many layers.
        tensors: of one dimension.
        size: bytes of the file, or of all parts.
        read: bytes that were read.
    """

    values: dict[str, Value]
    tensors: tuple[GgufTensor, ...]
    size: int
    read: int


def read_gguf(path: Path) -> Gguf:
    """The header of a file, and of its other parts where its name says that there are some.

    Raises CheckpointError for a file that is damaged, incomplete, or of a version not known.
    """
    headers = [_read_part(part) for part in _parts(path)]
    tensors = tuple(t for header in headers for t in header.tensors)
    names = [t.name for t in tensors]
    if len(set(names)) < len(names):
        raise CheckpointError(f"{path} names a tensor twice; fetch the file again")
    size, read = sum(h.size for h in headers), sum(h.read for h in headers)
    return Gguf(headers[0].values, tensors, size, read)


def read_tensor(tensor: GgufTensor) -> bytes:
    """The bytes of one tensor."""
    return read_range(tensor.path, tensor.start, tensor.start + tensor.length)


def _parts(path: Path) -> list[Path]:
    found = _PART.search(path.name)
    if found is None:
        return [path]
    stem, count = path.name[: found.start()], int(found[2])
    if not 0 < count <= 1000:
        raise CheckpointError(f"{path} says it is one of {count} parts, which no writer makes")
    return [path.with_name(f"{stem}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]


def _read_part(path: Path) -> Gguf:
    with closing(_Cursor(path)) as cursor:
        if cursor.take(4) != MAGIC:
            raise CheckpointError(f"{path} is no GGUF file; fetch it again, or correct the path")
        (version,) = cursor.unpack("I")
        if version not in (2, 3):
            raise CheckpointError(
                f"{path} is a GGUF file of version {version}, and only little-endian 2 and 3 are "
                "read; convert the model again"
            )
        tensor_count, key_count = cursor.unpack("QQ")
        cursor.check(tensor_count <= _MOST_TENSORS, f"it claims {tensor_count} tensors")
        cursor.check(key_count <= _MOST_KEYS, f"it claims {key_count} keys")
        values = _values(cursor, key_count)
        rows = [_description(cursor) for _ in range(tensor_count)]
        alignment = values.get("general.alignment", 32)
        good = isinstance(alignment, int) and 0 < alignment <= _BLOCK
        cursor.check(good, f"its alignment is {shown(alignment)}")
        assert isinstance(alignment, int)
        start = -(-cursor.at // alignment) * alignment
        placed = [_placed(cursor, row, start) for row in rows]
        tensors = tuple(tensor for tensor in placed if tensor is not None)
        return Gguf(values, tensors, cursor.size, cursor.read)


def _values(cursor: _Cursor, count: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for _ in range(count):
        key = cursor.text(1 << 16)
        (kind,) = cursor.unpack("I")
        if kind == _ARRAY:
            _skip_array(cursor, 0)
        elif kind == _STRING and not _KEPT.fullmatch(key):
            cursor.skip(cursor.unpack("Q")[0])
        else:
            value = cursor.text(_LONGEST_VALUE) if kind == _STRING else _scalar(cursor, kind)
            if _KEPT.fullmatch(key):
                values[key[:_LONGEST_VALUE]] = value
    return values


def _scalar(cursor: _Cursor, kind: int) -> Value:
    cursor.check(kind in _SCALARS, f"a key has the unknown type {kind}")
    value: Value = cursor.unpack(_SCALARS[kind])[0]
    return value


def _skip_array(cursor: _Cursor, depth: int) -> None:
    kind, count = cursor.unpack("IQ")
    cursor.check(depth < _MOST_NESTING, "its keys are nested too deeply")
    if kind == _STRING:
        cursor.skip_strings(count)
    elif kind == _ARRAY:
        cursor.check(count <= _MOST_KEYS, f"a key holds {count} lists")
        for _ in range(count):
            _skip_array(cursor, depth + 1)
    else:
        cursor.check(kind in _SCALARS, f"a key has the unknown type {kind}")
        cursor.skip(count * struct.calcsize("<" + _SCALARS[kind]))


def _description(cursor: _Cursor) -> _Row:
    """The next tensor."""
    name = cursor.text(_LONGEST_NAME)
    (dimensions,) = cursor.unpack("I")
    cursor.check(dimensions <= 8, f"tensor {shown(name)} has {dimensions} dimensions")
    shape = cursor.unpack(f"{dimensions}Q")
    type_id, offset = cursor.unpack("IQ")
    return name, shape, type_id, offset


def _placed(cursor: _Cursor, row: _Row, start: int) -> GgufTensor | None:
    """A tensor of one dimension, where it is; None for others, which are not read."""
    name, shape, type_id, offset = row
    size = shape[0] if len(shape) == 1 else 0
    tensor = GgufTensor(name, _FLOATS.get(type_id), type_id, size, cursor.path, start + offset)
    cursor.check(
        tensor.start + tensor.length <= cursor.size,
        f"tensor {shown(name)} reaches beyond its end",
    )
    cursor.check(tensor.length <= MOST_BYTES, f"tensor {shown(name)} has {size} elements")
    return tensor if len(shape) == 1 else None


class _Cursor:
    """A position in a file that is read in blocks; whatever lies beyond its end is an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_regular(path)
        self._fd = self._file.fileno()
        self.size = os.fstat(self._fd).st_size
        self.read = 0
        self._buffer = b""
        self._base = 0  # file offset of the buffer
        self._index = 0  # position in the buffer, perhaps beyond its end

    def close(self) -> None:
        self._file.close()

    @property
    def at(self) -> int:
        """The file offset."""
        return self._base + self._index

    def check(self, good: bool, problem: str) -> None:
        """CheckpointError that names the file and the problem, unless all is good."""
        if not good:
            raise CheckpointError(f"{self.path} is damaged: {problem}; fetch the file again")

    def take(self, length: int) -> bytes:
        """The next bytes."""
        self._fill(length)
        raw = self._buffer[self._index : self._index + length]
        self._index += length
        return raw

    def unpack(self, form: str) -> tuple[int, ...]:
        """The next numbers."""
        form = "<" + form
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self, longest: int) -> str:
        """The next string."""
        (length,) = self.unpack("Q")
        self.check(length <= longest, f"a name has {length} bytes")
        return self.take(length).decode("utf-8", "backslashreplace")

    def skip(self, length: int) -> None:
        """Step over bytes without reading them."""
        self.check(self.at + length <= self.size, "it ends within its header")
        self._index += length

    def skip_strings(self, count: int) -> None:
        """Step over a vocabulary."""
        self.check(count <= _MOST_STRINGS, f"a key holds {count} strings")
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if self._index + 8 > len(self._buffer):
                self._fill(8)
            self._index += 8 + unpack(self._buffer, self._index)[0]
        self.check(self.at <= self.size, "it ends within its header")

    def _fill(self, length: int) -> None:
        """Have `length` bytes in the buffer from where we are."""
        if self._index + length <= len(self._buffer):
            return
        start = self.at
        self.check(start + length <= self.size, "it ends within its header")
        self._buffer = os.pread(self._fd, max(length, _BLOCK), start)
        self.check(len(self._buffer) >= length, "it shrank while it was read")
        self.read += len(self._buffer)
        self._base, self._index = start, 0
