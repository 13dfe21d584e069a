"""Write planned files into a staging folder: header, patched tensors, and runs copied as bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gemma_fold.checkpoint.copy import Copier
from gemma_fold.checkpoint.layout import Run
from gemma_fold.checkpoint.output import Staging
from gemma_fold.checkpoint.source import FileState
from gemma_fold.errors import CheckpointError
from gemma_fold.progress import Progress


class Transfer:
    """Moves files from one folder into a staging folder and reports progress."""

    def __init__(self, source: Path, staging: Staging, progress: Progress) -> None:
        self._copier = Copier()
        self._source = source
        self._staging = staging
        self._progress = progress
        self._number = 0

    @property
    def moved(self) -> dict[str, int]:
        """Bytes by method of the copy ladder."""
        return {method.value: count for method, count in self._copier.moved.items()}

    def copy(self, name: str, state: FileState) -> None:
        """Copy a whole file, unless an earlier run did."""
        if self._begin(name, state.size):
            return
        with self._open_source(name, state) as source, self._staging.create(name) as target:
            self._copier.copy(source, 0, target, 0, state.size, self._progress.advance)

    def patch(
        self,
        name: str,
        state: FileState,
        *,
        header: bytes,
        runs: Iterable[Run],
        patches: Mapping[int, bytes],
        size: int,
    ) -> None:
        """Write a safetensors file: `header`, `patches` by file offset, and copied `runs`."""
        if self._begin(name, size):
            return
        with self._open_source(name, state) as source, self._staging.create(name) as target:
            os.ftruncate(target, size)
            for run in runs:
                self._copier.copy(
                    source, run.source, target, run.target, run.length, self._progress.advance
                )
            for offset, data in {0: len(header).to_bytes(8, "little") + header, **patches}.items():
                _write_at(target, offset, data)
                self._progress.advance(len(data))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file that is made here."""
        if not self._begin(name, len(data)):
            self._staging.write(name, data)
            self._progress.advance(len(data))

    def _begin(self, name: str, size: int) -> bool:
        self._number += 1
        self._progress.file(name, self._number)
        done = self._staging.is_done(name)
        if done:
            self._progress.advance(size)
        return done

    @contextmanager
    def _open_source(self, name: str, state: FileState) -> Iterator[int]:
        """Open for reading; afterwards make sure that the file was the planned one throughout."""
        path = self._source / name
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
