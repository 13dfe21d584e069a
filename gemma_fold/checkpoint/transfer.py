"""Write planned files into a staging folder: header, patched tensors, and runs copied as bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gemma_fold.checkpoint.copy import Copier, data_runs
from gemma_fold.checkpoint.digest import Digester, Part, whole
from gemma_fold.checkpoint.header import with_length
from gemma_fold.checkpoint.journal import Done
from gemma_fold.checkpoint.layout import Run
from gemma_fold.checkpoint.progress import Progress
from gemma_fold.checkpoint.source import FileState
from gemma_fold.checkpoint.staging import Staging
from gemma_fold.errors import CheckpointError


class Transfer:
    """Moves files from one folder into a staging folder and reports progress.

    Attributes:
        digests: BLAKE3 of the source's bytes, by file and the names of its parts; empty without a
            digester.
    """

    def __init__(
        self,
        source: Path,
        staging: Staging,
        progress: Progress,
        digester: Digester | None = None,
        *,
        stored: Mapping[str, str] | None = None,
    ) -> None:
        """`stored`: what files are called in the folder they come from, where that differs."""
        self.digests: dict[str, Mapping[str, str]] = {}
        self._copier = Copier()
        self._source = source
        self._stored = stored or {}
        self._staging = staging
        self._progress = progress
        self._digester = digester
        self._number = 0

    @property
    def moved(self) -> dict[str, int]:
        """Bytes by method of the copy ladder."""
        return {method.value: count for method, count in self._copier.moved.items()}

    def copy(self, name: str, state: FileState) -> None:
        """Copy a whole file, unless an earlier run did."""
        everything = (Run(0, 0, state.size),)
        self._fill(name, state, everything, {}, state.size, whole(state.size))

    def patch(
        self,
        name: str,
        state: FileState,
        *,
        header: bytes,
        runs: Iterable[Run],
        patches: Mapping[int, bytes],
        size: int,
        parts: Iterable[Part] = (),
    ) -> None:
        """Write a safetensors file: `header`, `patches` by file offset, and copied `runs`.

        `parts` of the source file are digested meanwhile.
        """
        written = {0: with_length(header), **patches}
        self._fill(name, state, runs, written, size, parts)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file that is made here."""
        if self._begin(name, len(data)) is None:
            self._staging.write(name, data)
            self._progress.advance(len(data))

    def _fill(
        self,
        name: str,
        state: FileState,
        runs: Iterable[Run],
        patches: Mapping[int, bytes],
        size: int,
        parts: Iterable[Part],
    ) -> None:
        done = self._begin(name, size)
        if done is not None:
            self.digests[name] = done.digests
            return
        digests: dict[str, str] = {}
        with (
            self._open_source(name, state) as source,
            self._staging.create(name, digests) as target,
        ):
            pending = self._digester.submit(source, parts) if self._digester else None
            os.ftruncate(target, size)
            for run in runs:
                self._copy_data(source, target, run)
            for offset, data in patches.items():
                _write_at(target, offset, data)
                self._progress.advance(len(data))
            if pending is not None:
                digests.update(pending.result())
        self.digests[name] = digests

    def _copy_data(self, source: int, target: int, run: Run) -> None:
        """Copy what a run holds; its holes stay holes, since the target was made anew."""
        left = run.length
        for part in data_runs(source, run):
            self._copier.copy(
                source, part.source, target, part.target, part.length, self._progress.advance
            )
            left -= part.length
        if left:
            self._progress.advance(left)

    def _begin(self, name: str, size: int) -> Done | None:
        self._number += 1
        self._progress.file(name, self._number)
        done = self._staging.done(name)
        if done is not None:
            self._progress.advance(size)
        return done

    @contextmanager
    def _open_source(self, name: str, state: FileState) -> Iterator[int]:
        """Open for reading; afterwards make sure that the file was the planned one throughout."""
        path = self._source / self._stored.get(name, name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {error.strerror}; the source changed, run again"
            ) from error
        try:
            yield descriptor
            if FileState.of(os.fstat(descriptor)) != state:
                raise CheckpointError(
                    f"{path} changed while it was read; let its writer finish, then run again"
                )
        finally:
            os.close(descriptor)


def _write_at(descriptor: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
