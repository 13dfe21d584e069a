"""A Hub model in a folder of its own, of which one weight file at a time is there whole.

At first a weight file is a hole with its header and the tensors that were asked for; `bring` fills
it, `drop` empties it. What has come of a file stays if the run is interrupted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from gemma_fold.checkpoint import hub
from gemma_fold.checkpoint.header import Header
from gemma_fold.checkpoint.layout import Run, merge_runs
from gemma_fold.checkpoint.names import work_folder_name
from gemma_fold.checkpoint.source import Checkpoint, FileState, Origin, open_checkpoint
from gemma_fold.errors import HostError, UsageError

_MARKER, _MODEL, _POSITION = "gemma-fold source", "model", "position"
_STEP = 2**26  # bytes between two notes of what has come
_PIECE = 2**20  # bytes
_THREADS = 8
_TRIES = 5  # in a row of which none brought anything

#: The names of the tensors that are needed at once, of a model's config and shapes.
Wanted = Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Collection[str]]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """See the module. `checkpoint` can be planned with before a weight file is whole."""

    folder: Path
    remote: hub.RemoteCheckpoint
    checkpoint: Checkpoint

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(file.state.size for file in self.checkpoint.weights)

    @property
    def largest(self) -> int:
        """Bytes of the largest weight file."""
        return max(file.state.size for file in self.checkpoint.weights)

    def bring(self, name: str, advance: Callable[[int], None]) -> FileState:
        """Fill a weight file.

        Raises:
            HostError: the Hub cannot be reached, or the disk is full; what came is kept.
        """
        path, size = self.folder / _MODEL / name, self.remote.files[name]
        position = self._position(name)
        advance(position)
        with open(path, "r+b", buffering=0) as file:
            at_once = self._fill(file.fileno(), name, position, size, advance)
            if not at_once and _sha256(file) != self.remote.sha256.get(name):
                self._forget()
                raise HostError(f"{name} of {self.remote.repo_id} came damaged; run again")
            return FileState.of(os.fstat(file.fileno()))

    def drop(self, name: str) -> None:
        """Free the disk of a weight file that is no longer needed."""
        self._forget()  # first: what a kill leaves is then taken for nothing that came
        os.truncate(self.folder / _MODEL / name, 0)

    def _fill(
        self, target: int, name: str, position: int, size: int, advance: Callable[[int], None]
    ) -> bool:
        """Whether all came in one piece."""
        stream, tries, noted = hub.open_stream(self.remote), 0, position
        at_once = position == 0
        while position < size:
            before = position
            try:
                for piece in stream(name, position, size):
                    os.pwrite(target, piece, position)
                    position += len(piece)
                    advance(len(piece))
                    if position - noted >= _STEP:
                        noted = self._note(target, name, position)
            except HostError:
                at_once = False
                self._note(target, name, position)
                tries = 0 if position > before else tries + 1
                if tries == _TRIES:
                    raise
            except BaseException:
                self._note(target, name, position)
                raise
        return at_once

    def _forget(self) -> None:
        (self.folder / _POSITION).unlink(missing_ok=True)

    def _position(self, name: str) -> int:
        try:
            found = json.loads((self.folder / _POSITION).read_bytes())
            position = int(found["bytes"]) if found["file"] == name else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return position if 0 <= position <= self.remote.files[name] else 0

    def _note(self, target: int, name: str, position: int) -> int:
        os.fsync(target)
        note = self.folder / (_POSITION + ".new")
        note.write_text(json.dumps({"file": name, "bytes": position}))
        note.replace(self.folder / _POSITION)
        return position


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while data := file.read(_PIECE):
        digest.update(data)
    return digest.hexdigest()


@contextmanager
def open_arrivals(
    repo_id: str, revision: str | None, out: Path, wanted: Wanted
) -> Iterator[Arrivals]:
    """Lay out the folder beside `out`, and remove it unless what came may be continued with.

    Raises:
        CheckpointError: no such model, or a damaged one.
        UsageError: something that is not ours has the folder's name.
        HostError: the Hub cannot be reached, or another process is at it.
    """
    remote = hub.fetch_headers(repo_id, revision)
    if remote.folder is not None:
        raise UsageError("HF_HUB_OFFLINE is set, so nothing can arrive; leave out --by-shard")
    real = Path(os.path.realpath(out))
    folder = real.with_name(work_folder_name(f"{real.name}.source"))
    with _locked(folder):
        try:
            _claim(folder, {"marker": _MARKER, "repo": repo_id, "commit": remote.commit})
            yield Arrivals(folder, remote, _lay_out(folder / _MODEL, remote, wanted))
        except (OSError, HostError, KeyboardInterrupt):
            raise  # kept: the next run goes on from there
        except UsageError:
            raise  # not ours
        except BaseException:
            shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise HostError(f"another process is using {folder}; wait for it to finish") from None
    finally:
        os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()  # if nothing is in it


def _claim(folder: Path, marker: Mapping[str, str]) -> None:
    """Make sure that the folder is ours, and empty it if it is of another model or commit."""
    note = folder / "marker"
    if os.listdir(folder):
        try:
            found = json.loads(note.read_bytes())
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or found.get("marker") != _MARKER:
            raise UsageError(f"{folder} was not made by gemma-fold; move it elsewhere")
        if found != marker:
            shutil.rmtree(folder / _MODEL, ignore_errors=True)
            (folder / _POSITION).unlink(missing_ok=True)
    note.write_text(json.dumps(marker))


def _lay_out(root: Path, remote: hub.RemoteCheckpoint, wanted: Wanted) -> Checkpoint:
    shapes = {
        t.name: t.shape for header in remote.headers.values() for t in header.tensors.values()
    }
    names = frozenset(wanted(remote.config, shapes))
    stream = hub.open_stream(remote)

    def fetch(piece: tuple[str, Run]) -> None:
        name, run = piece
        with open(root / name, "r+b", buffering=0) as file:
            position = run.target
            for data in stream(name, run.source, run.source + run.length):
                position += os.pwrite(file.fileno(), data, position)

    pieces: list[tuple[str, Run]] = []
    for name in remote.needed():
        path, size, header = root / name, remote.files[name], remote.headers.get(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b") as file:
            file.truncate(size)
        runs = (Run(0, 0, size),) if header is None else _first(header, names)
        pieces += [(name, run) for run in runs]
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(fetch, pieces):
            pass
    origin = Origin(remote.repo_id, remote.repo_id, remote.commit)
    return replace(open_checkpoint(root, origin), sha256=remote.sha256)


def _first(header: Header, wanted: Collection[str]) -> tuple[Run, ...]:
    """The bytes of a weight file that are needed before all others."""
    ranges = [(0, header.data_start)] + [
        (header.data_start + t.start, t.end - t.start)
        for t in header.tensors.values()
        if t.name in wanted
    ]
    return merge_runs(Run(begin, begin, length) for begin, length in sorted(ranges))
