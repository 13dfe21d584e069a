"""Every tensor of two checkpoints, classed; bytes are streamed, so memory does not grow."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma_fold.checkpoint.header import ITEMSIZE, TensorEntry
from gemma_fold.checkpoint.progress import Progress
from gemma_fold.compare.sides import Side
from gemma_fold.compare.weights.norms import NormStats, StoredNorm, TensorClass, compare_norm
from gemma_fold.errors import CheckpointError
from gemma_fold.format.arithmetic import decode, is_foldable_dtype

_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor that both sides have.

    Attributes:
        name: of the tensor.
        found: its class.
        remark: what is special, in words.
        norm: numbers, for zero-centred norms.
        changed: elements (bytes for sub-byte dtypes) that differ, for other tensors.
        max_abs: largest difference of two values, for other tensors of a 16- or 32-bit float dtype.
    """

    name: str
    found: TensorClass
    remark: str = ""
    norm: NormStats | None = None
    changed: int = 0
    max_abs: float | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """The outcome of the weight comparison.

    Attributes:
        counts: tensors by class.
        norms: every zero-centred norm.
        others: every other tensor that is not identical.
        compared: bytes of side A that were compared.
        files: other files of the same size whose bytes differ.
    """

    counts: Mapping[TensorClass, int]
    norms: tuple[TensorDiff, ...]
    others: tuple[TensorDiff, ...]
    compared: int
    files: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether a model computes the same with either side's weights."""
        return all(found.same for found in self.counts)

    @property
    def max_ulp(self) -> int:
        """The largest error of any gain, in float32 units in the last place."""
        return max((t.norm.max_ulp for t in self.norms if t.norm), default=0)

    @property
    def changed(self) -> int:
        """Norm weights whose gain differs."""
        return sum(t.norm.changed for t in self.norms if t.norm)

    @property
    def elements(self) -> int:
        """Norm weights in all."""
        return sum(t.norm.elements for t in self.norms if t.norm)

    @property
    def histogram(self) -> tuple[int, ...]:
        """Norm weights by ulp distance; see `NormStats.histogram`."""
        rows = [t.norm.histogram for t in self.norms if t.norm]
        return tuple(sum(column) for column in zip(*rows, strict=True))


def compare_weights(a: Side, b: Side, progress: Progress | None = None) -> Weights:
    """Class every tensor that both sides have, and compare the bytes of other files.

    Raises:
        CheckpointError: a file shrinks while it is read.
    """
    progress = progress or Progress()
    in_a, in_b = a.tensors(), b.tensors()
    folds = {**b.folds, **a.folds}
    names = [name for name in in_a if name in in_b]
    # In the order of A's files, so that disks are read from front to back.
    names.sort(key=lambda n: (in_a[n][0], in_a[n][1].start))
    progress.start(sum(in_a[n][1].end - in_a[n][1].start for n in names), len(a.headers))
    counts: Counter[TensorClass] = Counter()
    norms, others = [], []
    compared = 0
    current = ""
    with ExitStack() as stack:
        files = _Files(a, b, stack)
        for name in names:
            if in_a[name][0] != current:
                current = in_a[name][0]
                progress.file(current, list(a.headers).index(current) + 1)
            one, two = files.view("a", *in_a[name]), files.view("b", *in_b[name])
            if name in folds and _is_comparable_norm(one, two):
                diff = _norm(name, a, b, one, two)
                norms.append(diff)
            else:
                diff = _plain(name, one, two)
                if diff.found is not TensorClass.IDENTICAL:
                    others.append(diff)
            counts[diff.found] += 1
            size = in_a[name][1].end - in_a[name][1].start
            compared += size
            progress.advance(size)
    progress.finish()
    return Weights(dict(counts), tuple(norms), tuple(others), compared, tuple(_files_differ(a, b)))


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor's bytes in an open file."""

    fd: int
    offset: int
    entry: TensorEntry
    path: Path

    @property
    def size(self) -> int:
        return self.entry.end - self.entry.start

    def read(self, start: int = 0, size: int | None = None) -> bytes:
        size = self.size if size is None else size
        raw = os.pread(self.fd, size, self.offset + start)
        if len(raw) != size:
            raise CheckpointError(f"{self.path} shrank while it was read; let its writer finish")
        return raw

    def is_same_place(self, other: _View) -> bool:
        """Whether both are one range of one file, through a link or two spellings of a path."""
        if self.offset != other.offset or self.size != other.size:
            return False
        return os.path.samestat(os.fstat(self.fd), os.fstat(other.fd))


class _Files:
    """Weight files of both sides, each opened once."""

    def __init__(self, a: Side, b: Side, stack: ExitStack) -> None:
        self._sides = {"a": a, "b": b}
        self._stack = stack
        self._open: dict[Path, int] = {}

    def view(self, which: str, file: str, entry: TensorEntry) -> _View:
        side = self._sides[which]
        assert side.root is not None
        path = side.root / file
        if path not in self._open:
            stream = self._stack.enter_context(open(path, "rb", buffering=0))  # noqa: SIM115
            self._open[path] = stream.fileno()
        offset = side.headers[file].data_start + entry.start
        return _View(self._open[path], offset, entry, path)


def _is_comparable_norm(a: _View, b: _View) -> bool:
    lengths = {a.entry.shape[:1], b.entry.shape[:1]}
    return (
        len(lengths) == 1
        and all(v.entry.shape[1:] in ((), (1,)) for v in (a, b))
        and is_foldable_dtype(a.entry.dtype)
        and is_foldable_dtype(b.entry.dtype)
    )


def _norm(name: str, a: Side, b: Side, one: _View, two: _View) -> TensorDiff:
    rule = a.folds.get(name) or b.folds[name]
    stored_a = StoredNorm(one.read(), one.entry.dtype, a.folded)
    stored_b = StoredNorm(two.read(), two.entry.dtype, b.folded)
    found, remark, stats = compare_norm(stored_a, stored_b, rule)
    return TensorDiff(name, found, remark, stats)


def _plain(name: str, a: _View, b: _View) -> TensorDiff:
    form_a, form_b = ((v.entry.dtype, v.entry.shape) for v in (a, b))
    if form_a == form_b:
        if a.is_same_place(b) or all(x == y for x, y in _chunks(a, b)):
            return TensorDiff(name, TensorClass.IDENTICAL)
        return _measure(name, a, b)
    remark = f"{form_a[0]} {list(form_a[1])} and {form_b[0]} {list(form_b[1])}"
    recast = form_a[1] == form_b[1] and all(is_foldable_dtype(f[0]) for f in (form_a, form_b))
    if not recast:
        return TensorDiff(name, TensorClass.UNEXPECTED, remark)
    diff = _measure(name, a, b)
    return replace(diff, remark=remark + (", other values" if diff.changed else ", equal values"))


def _chunks(a: _View, b: _View, step: int = _CHUNK) -> Iterator[tuple[bytes, bytes]]:
    """The same elements of both, a piece at a time; sizes differ if the dtypes do."""
    ratio = b.size / a.size if a.size else 1
    for start in range(0, a.size, step):
        size = min(step, a.size - start)
        yield a.read(start, size), b.read(int(start * ratio), int(size * ratio))


def _measure(name: str, a: _View, b: _View) -> TensorDiff:
    dtype_a, dtype_b = a.entry.dtype, b.entry.dtype
    changed, largest = 0, 0.0
    floating = is_foldable_dtype(dtype_a) and is_foldable_dtype(dtype_b)
    for one, two in _chunks(a, b, _CHUNK // 4):
        if floating:
            x, y = decode(one, dtype_a), decode(two, dtype_b)
            if dtype_a != dtype_b:
                changed += int(np.count_nonzero(x != y))
            with np.errstate(invalid="ignore", over="ignore"):
                largest = max(largest, float(np.nanmax(np.abs(x - y), initial=0.0)))
        if dtype_a == dtype_b:
            changed += _count_changed(one, two, int(max(1, ITEMSIZE[dtype_a])))
    return TensorDiff(
        name, TensorClass.UNEXPECTED, "", None, changed, largest if floating else None
    )


def _count_changed(a: bytes, b: bytes, width: int) -> int:
    one, two = (np.frombuffer(raw, np.uint8).reshape(-1, width) for raw in (a, b))
    return int(np.count_nonzero((one != two).any(axis=1)))


def _files_differ(a: Side, b: Side) -> Iterator[str]:
    if a.root is None or b.root is None:
        return
    for name, size in sorted(a.files.items()):
        if b.files.get(name) == size and not _same_file(a.root / name, b.root / name):
            yield name


def _same_file(a: Path, b: Path) -> bool:
    if os.path.samefile(a, b):
        return True
    with open(a, "rb") as one, open(b, "rb") as two:
        while chunk := one.read(_CHUNK):
            if chunk != two.read(_CHUNK):
                return False
    return True
