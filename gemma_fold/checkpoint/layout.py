"""Lay a weight file out anew with some tensors replaced, and plan which byte runs move where.

Tensors keep their order in the header and in the data section, so what lies between two replaced
tensors stays one contiguous run that the kernel can copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter

from gemma_fold.checkpoint.header import ITEMSIZE, Header, TensorEntry, render_header

_ALIGNMENT = 64  # bytes; the widest vector registers there are


@dataclass(frozen=True, slots=True)
class Layout:
    """A weight file as it will be: its header, and where every byte comes from.

    Attributes:
        header: JSON bytes, without the 8-byte length.
        tensors: the new entries, in header order; offsets count from the data section's start.
        data_start: file offset of the data section.
        size: bytes of the whole file.
        runs: untouched bytes, by file offset in the old and the new file.
    """

    header: bytes
    tensors: Mapping[str, TensorEntry]
    data_start: int
    size: int
    runs: tuple[Run, ...]

    def offset(self, name: str) -> int:
        """File offset of a tensor's first byte."""
        return self.data_start + self.tensors[name].start


@dataclass(frozen=True, slots=True)
class Run:
    """`length` bytes that move from file offset `source` to file offset `target`."""

    source: int
    target: int
    length: int


def replace_tensors(header: Header, replaced: Mapping[str, tuple[str, tuple[int, ...]]]) -> Layout:
    """Plan a file like `header`'s in which `replaced` tensors have a new (dtype, shape).

    The order of the data section is kept. Only if that would put a tensor at an offset its
    dtype cannot be read from, though it was aligned before, are the wider dtypes moved to the
    front, which is the order safetensors itself writes.
    """
    entries = [_resized(t, replaced.get(t.name)) for t in header.tensors.values()]
    by_offset = sorted(
        entries, key=lambda t: (header.tensors[t.name].start, header.tensors[t.name].end)
    )
    placed = _place(by_offset)
    if _loses_alignment(header, placed):
        placed = _place(sorted(by_offset, key=lambda t: -ITEMSIZE[t.dtype]))
    tensors = {name: placed[name] for name in header.tensors}
    raw = render_header(tensors.values(), header.metadata)
    # Vectorized code sums in an order that depends on the alignment of memory-mapped weights, so
    # they keep theirs: norms are usually multiples of 64 bytes, and the header is made to follow.
    if header.data_start % 8 == 0:
        raw += b" " * ((header.data_start - 8 - len(raw)) % _ALIGNMENT)
    data_start = 8 + len(raw)
    size = data_start + max((t.end for t in placed.values()), default=0)
    kept = (name for name in header.tensors if name not in replaced)
    pieces = (
        Run(
            header.data_start + header.tensors[name].start,
            data_start + placed[name].start,
            placed[name].end - placed[name].start,
        )
        for name in kept
    )
    return Layout(raw, tensors, data_start, size, merge_runs(pieces))


def merge_runs(pieces: Iterable[Run]) -> tuple[Run, ...]:
    """Join pieces that are neighbours in both files; empty ones disappear."""
    runs: list[Run] = []
    for piece in sorted((p for p in pieces if p.length), key=attrgetter("target")):
        last = runs[-1] if runs else None
        if (
            last
            and last.source + last.length == piece.source
            and last.target + last.length == piece.target
        ):
            runs[-1] = replace(last, length=last.length + piece.length)
        else:
            runs.append(piece)
    return tuple(runs)


def _resized(tensor: TensorEntry, form: tuple[str, tuple[int, ...]] | None) -> TensorEntry:
    if form is None:
        return tensor
    dtype, shape = form
    return TensorEntry(tensor.name, dtype, shape, 0, int(math.prod(shape) * ITEMSIZE[dtype]))


def _place(ordered: list[TensorEntry]) -> dict[str, TensorEntry]:
    placed: dict[str, TensorEntry] = {}
    position = 0
    for tensor in ordered:
        length = tensor.end - tensor.start
        placed[tensor.name] = replace(tensor, start=position, end=position + length)
        position += length
    return placed


def _loses_alignment(header: Header, placed: Mapping[str, TensorEntry]) -> bool:
    # The new data section starts at a multiple of 8, so offsets within it decide.
    for old in header.tensors.values():
        new = placed[old.name]
        old_width, new_width = (int(max(1, ITEMSIZE[t.dtype])) for t in (old, new))
        was_aligned = (header.data_start + old.start) % old_width == 0
        if was_aligned and new.start % new_width:
            return True
    return False
