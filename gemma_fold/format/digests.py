"""Is a folded checkpoint what was written? By the digests that were taken then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from gemma_fold.checkpoint.digest import Part, digest_parts, digest_text, tensor_parts, whole
from gemma_fold.checkpoint.header import with_length
from gemma_fold.checkpoint.progress import Progress
from gemma_fold.checkpoint.source import CONFIG, Checkpoint, WeightFile, read_tensor
from gemma_fold.errors import CheckpointError, UsageError
from gemma_fold.format.arithmetic import fold
from gemma_fold.format.manifest import Manifest, SourceFile
from gemma_fold.format.reader import open_folded, restore


def wrong_gammas(checkpoint: Checkpoint, manifest: Manifest) -> Iterator[str]:
    """A line for each gamma that is not the fold of the original weight."""
    files = {file.name: file for file in checkpoint.weights}
    for tensor in manifest.tensors.values():
        gamma = read_tensor(files[tensor.file], tensor.name)
        try:
            raw = restore(tensor, gamma)
        except CheckpointError as error:
            yield str(error)
            continue
        if fold(raw, tensor.dtype, tensor.fold).tobytes() != gamma:
            yield f"{tensor.name}: gamma is not the fold of the original weight"


def check_unchanged(folder: Path) -> None:
    """UsageError unless every byte of the folded checkpoint in `folder` is what `convert` wrote."""
    try:
        checkpoint, manifest = open_folded(folder)
    except CheckpointError as error:
        raise UsageError(f"{folder} was changed since, so it is not replaced ({error})") from error
    if not manifest.intact or not _has_every_digest(manifest):
        raise UsageError(
            f"{folder} was converted without digests, so whether it was changed since cannot be "
            "known, and it is not replaced; move it elsewhere, or name a new folder"
        )
    digests = Digests(checkpoint, manifest, Progress())
    for problem in (*wrong_gammas(checkpoint, manifest), *digests.check()):
        raise UsageError(
            f"{folder} was changed since it was converted, so it is not replaced ({problem}); "
            "move it elsewhere, or name a new folder"
        )


def _has_every_digest(manifest: Manifest) -> bool:
    """Whether a change of any file would be seen."""
    texts = {CONFIG, *filter(None, [manifest.index_name])}  # written anew: not the source's bytes
    for name, file in manifest.files.items():
        if name in texts:
            known = name in manifest.written
        elif file.header is not None:
            known = file.tensors is not None and file.folded_header is not None
        else:
            known = file.blake3 is not None
        if not known:
            return False
    return True


class Digests:
    """Reads every byte once.

    Attributes:
        checked: bytes whose digest is the recorded one.
    """

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest, progress: Progress) -> None:
        self.checked = 0
        self._checkpoint = checkpoint
        self._manifest = manifest
        self._progress = progress

    def check(self) -> Iterator[str]:
        """A line for each text, file or tensor that is not what was written."""
        manifest, weights = self._manifest, {f.name: f for f in self._checkpoint.weights}
        copied = {**{f.name: f.state for f in weights.values()}, **self._checkpoint.others}
        self._progress.start(self._checkpoint.size, len(manifest.files))
        yield from self._texts()
        for number, (name, file) in enumerate(manifest.files.items(), 1):
            self._progress.file(name, number)
            if file.header is not None:
                yield from self._rewritten(weights[name], file)
            elif file.blake3 is not None and name in copied:
                path = self._checkpoint.root / name
                found = self._digest(path, whole(copied[name].size))[""]
                if found != file.blake3:
                    yield f"{name}: its bytes are not what was written"
        self._progress.finish()

    def _texts(self) -> Iterator[str]:
        for name, raw in (
            (CONFIG, self._checkpoint.config_raw),
            (self._checkpoint.index_name, self._checkpoint.index_raw),
        ):
            expected = self._manifest.written.get(name or "")
            if expected is not None and raw is not None:
                if digest_text(raw) != expected:
                    yield f"{name}: its text is not what was written"
                self._count(len(raw))

    def _rewritten(self, file: WeightFile, original: SourceFile) -> Iterator[str]:
        digest = digest_text(with_length(file.header.raw))
        if original.folded_header not in (None, digest):
            yield f"{file.name}: its header is not what was written"
        expected = original.tensors or {}
        parts = tensor_parts(file.header, file.header.tensors.keys() - expected.keys())
        for name, found in self._digest(file.path, parts).items():
            if found != expected[name]:
                yield f"{name}: its bytes in {file.name} are not what was written"

    def _digest(self, path: Path, parts: tuple[Part, ...]) -> dict[str, str]:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return digest_parts(descriptor, parts, self._count)
        finally:
            os.close(descriptor)

    def _count(self, size: int) -> None:
        self.checked += size
        self._progress.advance(size)
