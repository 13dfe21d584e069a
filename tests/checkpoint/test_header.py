"""Headers: everything we accept, the safetensors library accepts, and reads the same way."""

import json
import os
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gemma_fold.checkpoint.header import (
    ITEMSIZE,
    MAX_HEADER_SIZE,
    Header,
    TensorEntry,
    header_length,
    parse_header,
    read_header,
    render_header,
)
from gemma_fold.errors import CheckpointError, HostError

FUZZ = settings(derandomize=True, deadline=None, database=None, max_examples=400)
ONE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
DEEP = b"[" * 126 + b"]" * 126
DEEPER = b"[" * 10**5 + b"]" * 10**5
Reading = tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str] | None]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers") / "model.safetensors"


def one(old: bytes, new: bytes) -> bytes:
    return ONE.replace(old, new)


def write(path: Path, raw: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def library_reads(path: Path) -> Reading | None:
    """The independent oracle: what safetensors itself makes of a file, None if it refuses."""
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
            return tensors, file.metadata()
    except SafetensorError:
        return None


def we_read(path: Path) -> Reading | None:
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return None
    metadata = None if header.metadata is None else dict(header.metadata)
    return {t.name: (t.dtype, t.shape) for t in header.tensors.values()}, metadata


# Valid files


def test_a_file_written_by_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "b": np.ones((2, 3), np.float16),
        "a": np.ones((), np.float32),
        "empty": np.ones((0, 7), np.int8),
    }
    save_file(tensors, path, {"format": "pt"})
    header = read_header(path)
    content = path.read_bytes()
    assert header.metadata == {"format": "pt"}
    assert {n: (t.dtype, t.shape) for n, t in header.tensors.items()} == {
        "b": ("F16", (2, 3)),
        "a": ("F32", ()),
        "empty": ("I8", (0, 7)),
    }
    assert content[8 : header.data_start] == header.raw
    assert header.data_size == len(content) - header.data_start == 16
    assert render_header(header.tensors.values(), header.metadata) == header.raw


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_each_dtype_has_the_library_s_size(dtype: str, path: Path) -> None:
    sizes = {}
    for bits in (4, 6, 8, 16, 32, 64):
        header = {"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}
        write(path, json.dumps(header).encode(), bytes(bits))
        assert we_read(path) == library_reads(path)
        if we_read(path):
            sizes[dtype] = Fraction(bits, 8)
    assert sizes == {dtype: ITEMSIZE[dtype]}


def test_no_dtype_of_the_library_is_missing(path: Path) -> None:
    write(path, one(b"F32", b"nonsense"), bytes(4))
    with pytest.raises(SafetensorError, match="expected one of") as caught, safe_open(path, "np"):
        pass
    listed = str(caught.value).split("expected one of")[1].split(" at line")[0]
    assert {name.strip(" `") for name in listed.split(",")} == set(ITEMSIZE)


@pytest.mark.parametrize(
    ("raw", "data"),
    [
        pytest.param(b"{}", b"", id="no tensors"),
        pytest.param(ONE + b" " * 4096, bytes(4), id="padding"),
        pytest.param(ONE + b"\n\t ", bytes(4), id="other white space at the end"),
        pytest.param(one(b"]}}", b'],"x":[{"y":1.5}]}}'), bytes(4), id="unknown key"),
        pytest.param(b'{"__metadata__":null}', b"", id="null metadata"),
        pytest.param(b'{"__metadata__":{}}', b"", id="empty metadata"),
        pytest.param(one(b'"a"', rb'"\ud83d\ude00"'), bytes(4), id="surrogate pair"),
        pytest.param(one(b'"a"', '"ä\U0001f600"'.encode()), bytes(4), id="utf-8 name"),
    ],
)
def test_accepted_as_the_library_does(raw: bytes, data: bytes, path: Path) -> None:
    write(path, raw, data)
    assert we_read(path) is not None
    assert we_read(path) == library_reads(path)


def test_tensors_come_in_header_order_not_in_offset_order(path: Path) -> None:
    entries = [TensorEntry("late", "U8", (2,), 4, 6), TensorEntry("early", "F32", (1,), 0, 4)]
    write(path, render_header(entries, None), bytes(6))
    assert list(read_header(path).tensors.values()) == entries
    assert library_reads(path) is not None


def test_without_a_data_size_only_the_ranges_are_checked() -> None:
    assert parse_header(ONE, data_size=None, where="x").data_size == 4
    with pytest.raises(CheckpointError):
        parse_header(ONE, data_size=5, where="x")


# Damaged files. Each row: what is wrong, header, data, what the message must say.

DAMAGED = [
    ("overlap", b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
     b'"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', bytes(3), "'b' overlaps"),
    ("same range", b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
     b'"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', bytes(2), "overlaps"),
    ("hole", b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
     b'"b":{"dtype":"U8","shape":[1],"data_offsets":[3,4]}}', bytes(4),
     "2 bytes before tensor 'b'"),
    ("hole in front", one(b"0,4", b"4,8"), bytes(8), "4 bytes before"),
    ("trailing bytes", ONE, bytes(7), "3 bytes of data after the last"),
    ("truncated", ONE, bytes(3), "1 bytes of data are missing"),
    ("out of range", one(b"0,4", b"0,4000"), bytes(4), "needs 4 bytes, has 4000"),
    ("backwards", one(b"0,4", b"4,0"), bytes(4), "has -4"),
    ("negative offset", one(b"0,4", b"-4,0"), bytes(4), "a begin and an end"),
    ("size", one(b"[1]", b"[2]"), bytes(4), "needs 8 bytes, has 4"),
    ("negative size", one(b"[1]", b"[-1]"), bytes(4), "not a list of sizes"),
    ("bool size", one(b"[1]", b"[true]"), bytes(4), "not a list of sizes"),
    ("float size", one(b"[1]", b"[1.0]"), bytes(4), "not a list of sizes"),
    ("minus zero", one(b"0,4", b"-0,4"), bytes(4), "a begin and an end"),
    ("null shape", one(b"[1]", b"null"), bytes(4), "not a list of sizes"),
    ("three offsets", one(b"0,4", b"0,4,4"), bytes(4), "a begin and an end"),
    ("unknown dtype", one(b"F32", b"F33"), bytes(4), "unknown dtype 'F33'"),
    ("dtype null", one(b'"F32"', b"null"), bytes(4), "unknown dtype None"),
    ("no dtype", one(b'"dtype"', b'"type"'), bytes(4), "has no dtype"),
    ("no shape", one(b'"shape"', b'"shap"'), bytes(4), "has no shape"),
    ("entry is a number", b'{"a":1}', b"", "not described by a map"),
    ("size over 64 bits", one(b"[1]", b"[4294967296,4294967296,0]"), bytes(4), "64 bits"),
    ("bits over 64 bits", one(b"[1]", b"[1152921504606846976]"), bytes(4), "64 bits"),
    ("integer over 64 bits", one(b"0,4", b"0,18446744073709551616"), bytes(4), "64 bits"),
    ("integer of 5000 digits", one(b"0,4", b"0,1" + b"0" * 5000), bytes(4), "64 bits"),
    ("part of a byte", b'{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', b"\0",
     "inside a byte"),
    ("metadata number", b'{"__metadata__":{"a":1}}', b"", "__metadata__ 'a' is not a string"),
    ("metadata list", b'{"__metadata__":[]}', b"", "__metadata__ is not a map"),
    ("not JSON", b'{"a":}', b"", "not JSON"),
    ("two documents", b"{} {}", b"", "not JSON"),
    ("NUL padding", b"{}\0\0", b"", "not JSON"),
    ("NaN", one(b"]}}", b'],"x":NaN}}'), bytes(4), "not JSON"),
    ("infinite", one(b"]}}", b'],"x":1e999}}'), bytes(4), "out of range"),
    ("not UTF-8", one(b'"a"', b'"\xff"'), bytes(4), "not UTF-8"),
    ("lone surrogate", one(b'"a"', rb'"\ud800"'), bytes(4), "not UTF-8"),
    ("UTF-8 mark", b"\xef\xbb\xbf{}", b"", 'does not start with "{"'),
    ("empty", b"", b"", 'does not start with "{"'),
    ("duplicate field", one(b'"dtype"', b'"shape":[1],"dtype"'), bytes(4), "twice"),
    ("deep", one(b"]}}", b'],"x":' + DEEP + b"}}"), bytes(4), "deeply"),
    ("very deep", one(b"]}}", b'],"x":' + DEEPER + b"}}"), bytes(4), "deeply"),
]  # fmt: skip

# The library lets these through, we do not. No writer produces them, and each could hide a tensor
# or mean something else to another reader.
STRICTER = [
    ("leading space", b" " + ONE, bytes(4), 'does not start with "{"'),
    ("duplicate empty tensor", b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
     b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "'a' appears twice"),
    ("duplicate metadata", b'{"__metadata__":{"k":"1","k":"2"}}', b"", "'k' appears twice"),
    ("duplicate inside", one(b"]}}", b'],"x":{"k":1,"k":2}}}'), bytes(4), "twice"),
    ("entry as a list", b'{"a":["F32",[1],[0,4]]}', bytes(4), "not described by a map"),
    ("dtype as a map", one(b'"F32"', b'{"F32":null}'), bytes(4), "unknown dtype"),
    ("large integer inside", one(b"]}}", b'],"x":18446744073709551616}}'), bytes(4), "64 bits"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "data", "says"), [pytest.param(*r[1:], id=r[0]) for r in DAMAGED])
def test_damage_is_refused_by_both(raw: bytes, data: bytes, says: str, path: Path) -> None:
    write(path, raw, data)
    assert library_reads(path) is None
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert says in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(("raw", "data", "says"), [pytest.param(*r[1:], id=r[0]) for r in STRICTER])
def test_where_we_are_stricter(raw: bytes, data: bytes, says: str, path: Path) -> None:
    write(path, raw, data)
    assert library_reads(path) is not None
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "only 0 bytes", id="empty"),
        pytest.param(b"\0" * 7, "only 7 bytes", id="seven bytes"),
        pytest.param(struct.pack("<Q", 100) + b"{}", "file has only 10", id="over the file"),
        pytest.param(struct.pack("<Q", 100_000_001) + b"{}", "over the format's", id="limit"),
        pytest.param(struct.pack("<Q", 2**64 - 1) + b"{}", "over the format's", id="all ones"),
    ],
)  # fmt: skip
def test_bad_length(content: bytes, says: str, path: Path) -> None:
    path.write_bytes(content)
    assert library_reads(path) is None
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert says in str(caught.value)


def test_the_largest_header_is_accepted_and_one_byte_more_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", b"{}".ljust(MAX_HEADER_SIZE))
    assert len(read_header(path).raw) == MAX_HEADER_SIZE
    with pytest.raises(CheckpointError, match="over the format's"):
        parse_header(b"{}".ljust(MAX_HEADER_SIZE + 1), data_size=0, where="x")


def test_a_git_lfs_pointer_is_recognised(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(path)


def test_missing_file_folder_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path)
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    with pytest.raises(HostError, match="cannot be read"):
        read_header(loop)


def test_the_data_is_neither_read_nor_mapped(tmp_path: Path) -> None:
    """A sparse terabyte: anything that touched its data would not come back."""
    size = 2**40
    path = tmp_path / "big.safetensors"
    raw = render_header([TensorEntry("w", "U8", (size,), 0, size)], None)
    write(path, raw)
    try:
        os.truncate(path, 8 + len(raw) + size)
    except OSError:
        pytest.skip("this file system holds no sparse file of 1 TiB")
    open_before = set(os.listdir("/proc/self/fd"))
    assert read_header(path).data_size == size
    assert set(os.listdir("/proc/self/fd")) == open_before


def test_header_length_of_remote_bytes() -> None:
    assert header_length(struct.pack("<Q", 2), 10, "x") == 2
    with pytest.raises(CheckpointError, match="x: its header would have 3 bytes"):
        header_length(struct.pack("<Q", 3), 10, "x")


def test_a_header_over_the_limit_is_not_written() -> None:
    with pytest.raises(CheckpointError, match="more shards"):
        render_header([], {"k": "x" * MAX_HEADER_SIZE})


# Fuzzing against the library

names = st.text(st.characters(codec="utf-8"), max_size=6).filter(
    lambda name: name != "__metadata__"
)
metadata = st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3)
scalars = st.none() | st.booleans() | st.integers(-9, 2**64) | st.floats() | st.text(max_size=3)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def layouts(draw: st.DrawFn) -> list[TensorEntry]:
    """Valid tensors in any header order."""
    entries: list[TensorEntry] = []
    position = 0
    for name in draw(st.lists(names, unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(ITEMSIZE)))
        shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 4, 8]), max_size=3)))
        size = ITEMSIZE[dtype]
        for dimension in shape:
            size *= dimension
        if size.denominator != 1:
            continue
        entries.append(TensorEntry(name, dtype, shape, position, position + int(size)))
        position += int(size)
    return draw(st.permutations(entries))


@FUZZ
@given(layouts(), metadata)
def test_valid_headers_read_the_same(
    path: Path, entries: list[TensorEntry], metadata: dict[str, str] | None
) -> None:
    raw = render_header(entries, metadata)
    assert len(raw) % 8 == 0
    write(path, raw, bytes(max((t.end for t in entries), default=0)))
    reading = we_read(path)
    assert reading is not None
    assert reading == library_reads(path)
    header: Header = read_header(path)
    assert list(header.tensors.values()) == entries
    assert header.metadata == metadata
    assert header.raw == raw


@pytest.mark.slow
@FUZZ
@given(layouts(), st.data())
def test_damaged_values_get_the_library_s_verdict(
    path: Path, entries: list[TensorEntry], data: st.DataObject
) -> None:
    """Edits of sizes, ranges, dtypes, types and the file's length, all well-formed as JSON."""
    document: dict[str, Any] = json.loads(render_header(entries, None))
    size = max((t.end for t in entries), default=0)
    for _ in range(data.draw(st.integers(1, 2))):
        edit: Callable[..., int] = data.draw(st.sampled_from([edit_entry, edit_document]))
        size = edit(document, size, data.draw)
    write(path, json.dumps(document, allow_nan=True).encode(), bytes(max(size, 0)))
    assert we_read(path) == library_reads(path)


def edit_entry(document: dict[str, Any], size: int, draw: st.DrawFn) -> int:
    if not document:
        return size + 1
    entry = document[draw(st.sampled_from(sorted(document)))]
    if not isinstance(entry, dict):
        return size
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
    near = st.lists(st.integers(-1, size + 8), min_size=2, max_size=2)
    shapes = st.lists(st.sampled_from([0, 1, 2, 2**32, 2**63]), max_size=3)
    choice = {"dtype": st.sampled_from(sorted(ITEMSIZE)), "shape": shapes, "data_offsets": near}
    entry[field] = draw(choice.get(field, json_values) | scalars)
    return size


def edit_document(document: dict[str, Any], size: int, draw: st.DrawFn) -> int:
    match draw(st.sampled_from(["drop", "copy", "metadata", "value", "length"])):
        case "drop" if document:
            del document[draw(st.sampled_from(sorted(document)))]
        case "copy" if document:
            document[draw(names)] = document[draw(st.sampled_from(sorted(document)))]
        case "metadata":
            document["__metadata__"] = draw(json_values)
        case "value":
            document[draw(names)] = draw(scalars)
        case _:
            return size + draw(st.sampled_from([-1, 1, 7]))
    return size


@pytest.mark.slow
@FUZZ
@given(layouts(), metadata, st.data())
def test_damaged_bytes_are_never_accepted_against_the_library(
    path: Path, entries: list[TensorEntry], metadata: dict[str, str] | None, data: st.DataObject
) -> None:
    raw = bytearray(render_header(entries, metadata))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        until = data.draw(st.integers(at, min(len(raw), at + 3)))
        raw[at:until] = data.draw(
            st.sampled_from([b'"', b",", b"[", b"}", b"0", b"-"]) | st.binary(max_size=3)
        )
    write(path, bytes(raw), bytes(max((t.end for t in entries), default=0)))
    ours, theirs = we_read(path), library_reads(path)
    assert ours is None or ours == theirs
