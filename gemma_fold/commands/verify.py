"""`verify`: prove that a folded checkpoint agrees with the format, the rules and its source."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_fold.checkpoint.header import ITEMSIZE
from gemma_fold.checkpoint.layout import Run
from gemma_fold.checkpoint.locate import open_source
from gemma_fold.checkpoint.progress import Progress
from gemma_fold.checkpoint.source import (
    CONFIG,
    Checkpoint,
    WeightFile,
    parse_json_object,
    read_tensor,
)
from gemma_fold.commands.card import as_source
from gemma_fold.errors import CheckpointError
from gemma_fold.format.arithmetic import fold
from gemma_fold.format.digests import Digests, wrong_gammas
from gemma_fold.format.manifest import Manifest, base_config, read_manifest
from gemma_fold.format.names import ARCHITECTURE_PREFIX, MANIFEST
from gemma_fold.format.reader import (
    folded_in,
    open_folded,
    original_header,
    untouched_runs,
)
from gemma_fold.rules import classify

_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The outcome of `verify`; `problems` is empty if everything holds.

    Attributes:
        tensors: folded tensors whose gamma was recomputed from the restored original bits.
        bytes_compared: bytes found equal to the source's; 0 without a source.
        bytes_proven: bytes whose digest was found to be the recorded one.
        problems: what is wrong, a line each.
        notes: what is worth knowing but not wrong.
    """

    tensors: int
    bytes_compared: int
    bytes_proven: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.problems


def verify(
    folded: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check format, locks, manifest, every gamma and every other byte.

    A gamma is right when the manifest's arithmetic turns it back into the bits the source had
    (by their digest) and folding those bits gives the gamma again. All else is compared with the
    digests taken at conversion, or with the source itself.

    Args:
        folded: the folded checkpoint's folder.
        against: the source, a folder or a Hub id.
        progress: receives events.

    Raises:
        CheckpointError: `folded` is not a folded checkpoint at all, or `against` is damaged.
    """
    root = Path(folded)
    read_manifest(root)
    source = open_source(against) if against is not None else None
    try:
        checkpoint, manifest = open_folded(root)
    except CheckpointError as error:
        return VerifyReport(0, 0, 0, (str(error),), ())
    problems = [
        *_check_config(root, manifest),
        *_check_rules(manifest),
        *_check_index(checkpoint, manifest),
        *_check_files(checkpoint, manifest),
        *wrong_gammas(checkpoint, manifest),
    ]
    proven = 0
    if source is None and not problems:
        digests = Digests(checkpoint, manifest, progress or Progress())
        problems = list(digests.check())
        proven = digests.checked
    compared = 0
    if source is not None and not problems:
        comparison = _Comparison(checkpoint, manifest, source, progress or Progress())
        problems = list(comparison.run())
        compared = comparison.compared
    extra = sorted(set(checkpoint.others) - set(manifest.files) - {MANIFEST})
    notes = [f"{name} was not in the source" for name in extra]
    if source is None and not manifest.has_digests:
        notes.append(
            "converted without digests: only the norms, config and index could be checked; "
            "use --against for the rest"
        )
    return VerifyReport(len(manifest.tensors), compared, proven, tuple(problems), tuple(notes))


def _check_config(root: Path, manifest: Manifest) -> Iterator[str]:
    base = base_config(root)
    if base != parse_json_object(manifest.config.encode(), f"config in {MANIFEST}"):
        yield f"{CONFIG}: base_config is not the original config that {MANIFEST} records"
    config = parse_json_object((root / CONFIG).read_bytes(), root / CONFIG)
    expected = [ARCHITECTURE_PREFIX + str(name) for name in base.get("architectures") or []]
    if config.get("architectures") != expected:
        yield f"{CONFIG}: architectures should be {expected}, so that other tools stop"


def _check_rules(manifest: Manifest) -> Iterator[str]:
    config = parse_json_object(manifest.config.encode(), f"config in {MANIFEST}")
    shapes = {t.name: t.shape for t in manifest.tensors.values()}
    for file in manifest.files.values():
        if file.header is not None:
            shapes |= {t.name: t.shape for t in original_header(file).tensors.values()}
    rules = classify(config, shapes).zero_centred()
    for name in sorted(set(rules) - set(manifest.tensors)):
        yield f"{name}: zero-centred by the rules but not folded"
    for name, tensor in manifest.tensors.items():
        if name not in rules:
            yield f"{name}: folded, but not zero-centred by the rules of this version"
        elif rules[name].fold != tensor.fold:
            yield f"{name}: folded as {tensor.fold}, but the rule is {rules[name].fold}"


def _check_index(checkpoint: Checkpoint, manifest: Manifest) -> Iterator[str]:
    if checkpoint.index_name != manifest.index_name:
        yield f"the weight index should be {manifest.index_name}, not {checkpoint.index_name}"
        return
    if checkpoint.index_raw is None or checkpoint.index_name is None or manifest.index is None:
        return
    found = parse_json_object(checkpoint.index_raw, checkpoint.index_name)
    before = parse_json_object(manifest.index.encode(), f"index in {MANIFEST}")
    if found.get("weight_map") != before.get("weight_map"):
        yield f"{checkpoint.index_name}: weight_map differs from the source's"
    growth = sum(
        entry.end - entry.start - _original_size(manifest, name)
        for name, (_, entry) in checkpoint.tensors().items()
        if name in manifest.tensors
    )
    old = (before.get("metadata") or {}).get("total_size")
    new = (found.get("metadata") or {}).get("total_size")
    if (old is None) != (new is None) or (old is not None and new != old + growth):
        yield f"{checkpoint.index_name}: total_size is {new}, not the source's plus {growth}"


def _original_size(manifest: Manifest, name: str) -> int:
    tensor = manifest.tensors[name]
    return int(tensor.shape[0] * ITEMSIZE[tensor.dtype])


def _check_files(checkpoint: Checkpoint, manifest: Manifest) -> Iterator[str]:
    sizes = {name: state.size for name, state in checkpoint.others.items()}
    for file in checkpoint.weights:
        original = manifest.files.get(file.name)
        if original is None:
            yield f"{file.name}: a weight file that the source did not have"
        elif original.header is None:
            sizes[file.name] = file.state.size
        else:
            try:
                untouched_runs(file.header, original_header(original), manifest)
            except CheckpointError as error:
                yield f"{file.name}: {error}"
    for name, size in sizes.items():
        original = manifest.files.get(name)
        if original is not None and original.size != size:
            yield f"{name}: {size} bytes, but the source had {original.size}"


class _Comparison:
    """Every byte that was not folded, and every gamma, against the source itself."""

    def __init__(
        self, folded: Checkpoint, manifest: Manifest, source: Checkpoint, progress: Progress
    ) -> None:
        self._folded, self._manifest, self._stored = as_source(folded, manifest)
        self._source = source
        self._progress = progress
        self.compared = 0

    def run(self) -> Iterator[str]:
        weights = {file.name: file for file in self._source.weights}
        names = {*weights, *self._source.others, CONFIG}
        names |= {self._source.index_name} if self._source.index_name else set()
        for name in sorted(names ^ set(self._manifest.files)):
            where = "the source" if name in names else "the folded checkpoint"
            yield f"{name}: only in {where}"
        yield from self._texts()
        shared = [file for file in self._folded.weights if file.name in weights]
        self._progress.start(self._source.size, len(names))
        for number, file in enumerate(shared, 1):
            self._progress.file(file.name, number)
            yield from self._weights(file, weights[file.name])
        for name in self._folded.others:
            if name in self._source.others:
                before = self._source.root / name
                after = self._folded.root / self._stored.get(name, name)
                size = self._source.others[name].size
                yield from self._ranges(name, before, after, (Run(0, 0, size),))
        self._progress.finish()

    def _texts(self) -> Iterator[str]:
        if self._source.config_raw != self._manifest.config.encode():
            yield f"{CONFIG}: the source's differs from the one that was folded"
        index = self._manifest.index
        if self._source.index_raw != (None if index is None else index.encode()):
            yield "the source's weight index differs from the one that was folded"

    def _weights(self, after: WeightFile, before: WeightFile) -> Iterator[str]:
        original = self._manifest.files[after.name]
        if original.header is None:
            whole = (Run(0, 0, before.state.size),)
            yield from self._ranges(after.name, before.path, after.path, whole)
            return
        if before.header.raw != original.header.encode():
            yield f"{after.name}: the source's header differs from the one that was folded"
            return
        runs = untouched_runs(after.header, before.header, self._manifest)
        yield from self._ranges(after.name, before.path, after.path, runs)
        yield from self._gammas(after, before)

    def _gammas(self, after: WeightFile, before: WeightFile) -> Iterator[str]:
        for tensor in folded_in(after.header, self._manifest):
            raw = read_tensor(before, tensor.name)
            if fold(raw, tensor.dtype, tensor.fold).tobytes() != read_tensor(after, tensor.name):
                yield f"{tensor.name}: gamma is not the fold of the source's weight"
            self._count(len(raw))

    def _ranges(self, name: str, before: Path, after: Path, runs: tuple[Run, ...]) -> Iterator[str]:
        """Compare byte ranges; a run's source is an offset in `after`, its target in `before`."""
        with open(before, "rb", buffering=0) as old, open(after, "rb", buffering=0) as new:
            for run in runs:
                for done in range(0, run.length, _CHUNK):
                    size = min(_CHUNK, run.length - done)
                    expected = os.pread(old.fileno(), size, run.target + done)
                    if os.pread(new.fileno(), size, run.source + done) != expected:
                        yield f"{name}: bytes differ from the source's near {run.target + done}"
                        return
                    self._count(size)

    def _count(self, size: int) -> None:
        self.compared += size
        self._progress.advance(size)
