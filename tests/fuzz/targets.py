"""What is fuzzed, and what must hold: one function of bytes for each reader of files.

A target returns where input is read or refused with GemmaFoldError. Whatever else it raises, any
time or memory beyond a multiple of the input's size, any verdict that the safetensors library does
not share, and any change outside of the output folder is a finding.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, deserialize

from gemma_fold.checkpoint.fields import parse_json_object
from gemma_fold.checkpoint.header import parse_header
from gemma_fold.checkpoint.source import check_config, index_map
from gemma_fold.commands.convert import convert
from gemma_fold.commands.inspect import inspect
from gemma_fold.commands.unfold import unfold
from gemma_fold.commands.verify import verify
from gemma_fold.errors import GemmaFoldError
from gemma_fold.format.manifest import parse_manifest
from gemma_fold.rules import classify

# Of one execution: far above what any takes, far below what quadratic work would.
SECONDS, SECONDS_PER_BYTE = 2.0, 50e-6
MEMORY, MEMORY_PER_BYTE = 64 << 20, 4096
_LARGEST_DATA = 1 << 16
_SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


T = TypeVar("T")


class Finding(AssertionError):
    """Something that must not happen, happened."""


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """Finding where the block takes more time or memory than its input's size allows."""
    start, before = time.process_time(), peak_memory()
    try:
        yield
    finally:
        seconds, memory = time.process_time() - start, peak_memory() - before
        if seconds > SECONDS + size * SECONDS_PER_BYTE:
            raise Finding(f"{seconds:.1f} s of processor time for {size} bytes")
        if memory > MEMORY + size * MEMORY_PER_BYTE:
            raise Finding(f"{memory >> 20} MiB of memory for {size} bytes")


def peak_memory() -> int:
    """The most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def accepted(data: bytes, read: Callable[[bytes], T]) -> T | None:
    """What `read` makes of the data; None where it refuses it."""
    with bounded(len(data)), suppress(GemmaFoldError):
        return read(data)
    return None


def header(data: bytes) -> None:
    """`parse_header`; what it accepts, the safetensors library accepts and reads the same."""
    ours = accepted(data, lambda raw: parse_header(raw, data_size=None, where="fuzzed"))
    if ours is None or ours.data_size > _LARGEST_DATA:
        return
    try:
        theirs = deserialize(struct.pack("<Q", len(data)) + data + bytes(ours.data_size))
    except SafetensorError as error:
        raise Finding(f"accepted, but the library says {error}") from None
    found = {name: (value["dtype"], tuple(value["shape"])) for name, value in theirs}
    if found != {t.name: (t.dtype, t.shape) for t in ours.tensors.values()}:
        raise Finding("the library reads other tensors")


_SHAPES = {
    "model.norm.weight": (4,),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.1.x_norm.weight": (4,),
    "vision_tower.norm.weight": (4,),
}


def config(data: bytes) -> None:
    """A config.json, as far as the rules read it."""
    accepted(
        data,
        lambda raw: classify(check_config(parse_json_object(raw, "fuzzed"), "fuzzed"), _SHAPES),
    )


def index(data: bytes) -> None:
    """A weight index."""
    mapped = accepted(data, lambda raw: index_map(raw, "fuzzed")) or {}
    for shard in mapped.values():
        if os.path.normpath(os.path.join("/out", shard)) != "/out/" + shard or "/" in shard:
            raise Finding(f"the shard {shard!r} is no file at the top")


def manifest(data: bytes) -> None:
    """A manifest; what is accepted can be written and reads back as it was."""
    found = accepted(data, lambda raw: parse_manifest(raw, "fuzzed"))
    if found is None:
        return
    if accepted(data, lambda _: parse_manifest(found.to_bytes(), "fuzzed")) != found:
        raise Finding("does not read back as it was")
    for name in (*found.files, *found.directories):
        if os.path.normpath(os.path.join("/out", name)) != "/out/" + name:
            raise Finding(f"{name!r} leaves the folder")


PARTS = ("config.json", "gemma_fold.json", "model.safetensors", "model.safetensors.index.json")
SEPARATOR = b"\n=====\n"


def folder(data: bytes) -> None:
    """A whole folder through inspect, verify, unfold and convert, beside files to be left alone.

    The input is the content of PARTS in that order and the data of the weights, with SEPARATOR
    between; an empty part is an absent file. The data section is cut, or filled with zeros, to the
    size that the header asks for, up to a limit.
    """
    *contents, payload = (data.split(SEPARATOR, len(PARTS)) + [b""] * len(PARTS))[: len(PARTS) + 1]
    root = Path(tempfile.mkdtemp(prefix="gemma-fold-fuzz-", dir=_SCRATCH))
    try:
        source = root / "in" / "model"
        source.mkdir(parents=True)
        for name, content in zip(PARTS, contents, strict=True):
            if name.endswith(".safetensors") and content:
                size = _data_size(content)
                content = struct.pack("<Q", len(content)) + content
                content += payload[:size].ljust(size, b"\0")
            if content:
                (source / name).write_bytes(content)
        canary = root / "canary"
        (canary / "below").mkdir(parents=True)
        (canary / "below" / "file").write_bytes(b"keep me")
        (root / "file").write_bytes(b"keep me too")
        before = _listing(root)
        with bounded(len(data)):
            _refused_or_done(lambda: inspect(source))
            _refused_or_done(lambda: verify(source))
            _refused_or_done(lambda: unfold(source, root / "out" / "unfolded"))
            _refused_or_done(lambda: convert(source, root / "out" / "folded"))
        after = {name: found for name, found in _listing(root).items() if name.parts[0] != "out"}
        if after != before:
            raise Finding(f"changed outside of OUT: {set(after.items()) ^ set(before.items())}")
    finally:
        shutil.rmtree(root)


def _data_size(content: bytes) -> int:
    try:
        size = parse_header(content, data_size=None, where="fuzzed").data_size
    except GemmaFoldError:
        return 0
    return size if size <= _LARGEST_DATA else 0


def _refused_or_done(action: Callable[[], object]) -> None:
    try:
        action()
    except GemmaFoldError as error:
        if "\n" in str(error) and not _says_a_name(str(error)):
            raise Finding(f"a message of several lines: {error}") from None


def _says_a_name(message: str) -> bool:
    # A tensor's name may hold a line break; the command line escapes it.
    return "tensor" in message or "norm" in message or "model_type" in message


def _listing(root: Path) -> dict[Path, bytes | None]:
    return {
        path.relative_to(root): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "config": config,
    "index": index,
    "manifest": manifest,
    "folder": folder,
}


def seeds(checkpoint: Path, folded: Path) -> dict[str, dict[str, bytes]]:
    """Inputs to start from, by target and name: the small files of a source and its folded form."""
    found: dict[str, dict[str, bytes]] = {name: {} for name in TARGETS}
    for kind, root in (("source", checkpoint), ("folded", folded)):
        parts = {name: b"" for name in PARTS}
        for path in sorted(root.glob("*.safetensors")):
            raw = path.read_bytes()
            found["header"][f"{kind}-{path.stem}"] = raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]
        for name in PARTS:
            if (root / name).is_file():
                parts[name] = (root / name).read_bytes()
        if weights := parts["model.safetensors"]:
            start = 8 + struct.unpack("<Q", weights[:8])[0]
            parts["model.safetensors"] = weights[8:start]
            found["folder"][kind] = SEPARATOR.join([*parts.values(), weights[start:]])
        for target, name in (("config", 0), ("manifest", 1), ("index", 3)):
            if content := parts[PARTS[name]]:
                found[target][kind] = content
    odd = {"model_type": "llava", "text_config": {"model_type": "gemma3_text"}}
    found["config"]["wrapper"] = json.dumps(odd).encode()
    return found
