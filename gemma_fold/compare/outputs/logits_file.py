"""Logits of side A in a file: written as they come, read back a window at a time.

The file is an ordinary safetensors file: `logits` [positions, vocabulary] in the dtype the model
gave, `tokens` [windows, window length], and in the metadata who made them. It exists because a
vocabulary of 262,144 makes a megabyte a position in float32.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma_fold.checkpoint.header import TensorEntry, read_header, render_header
from gemma_fold.errors import CheckpointError, HostError, UsageError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: Bytes kept for the metadata, which is complete only at the end.
_ROOM = 256 << 10


class LogitsWriter:
    """Writes a logits file; removed again unless `finish` was called."""

    def __init__(self, path: Path, windows: tuple[tuple[int, ...], ...]) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._tokens = np.asarray(windows, "<i4")
        self._entries: tuple[TensorEntry, ...] = ()
        self._size = 0
        self._finished = False
        try:
            self._file = open(self._partial, "wb")  # noqa: SIM115  (closed by __exit__)
        except OSError as error:
            raise HostError(
                f"{path} cannot be written ({error.strerror}); check its folder and permissions"
            ) from None

    def __enter__(self) -> LogitsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._file.close()
        if not self._finished:
            self._partial.unlink(missing_ok=True)

    def append(self, logits: Tensor) -> None:
        """Add rows: [positions, vocabulary], always of one dtype."""
        if not self._entries:
            self._begin(logits)
        raw = logits.detach().cpu().contiguous().view(torch.uint8).numpy()
        self._file.write(raw.data)

    def finish(self, metadata: dict[str, Any]) -> LogitsFile:
        """Write the header, give the file its name, and open it."""
        text = json.dumps(metadata, ensure_ascii=False)
        raw = render_header(self._entries, {"gemma_fold.diff": text})
        if len(raw) > self._size:
            raise HostError("the metadata of the logits file grew too large")
        self._file.seek(0)
        self._file.write(self._size.to_bytes(8, "little") + raw.ljust(self._size))
        self._file.close()
        os.replace(self._partial, self._path)
        self._finished = True
        return LogitsFile.open(self._path)

    def read(self) -> LogitsFile:
        """The rows written so far, under the file's temporary name."""
        self._file.flush()
        _, logits = self._entries
        return LogitsFile(
            self._partial,
            _DTYPES[logits.dtype],
            (logits.shape[0], logits.shape[1]),
            {},
            8 + self._size + logits.start,
        )

    def _begin(self, logits: Tensor) -> None:
        vocabulary, dtype = logits.shape[-1], _NAMES[logits.dtype]
        tokens, positions = self._tokens, self._tokens.size
        size = positions * vocabulary * logits.element_size()
        free = shutil.disk_usage(self._partial.parent).free
        if size > free:
            raise HostError(
                f"the logits of {positions} positions take {size / 1e9:.1f} GB, but "
                f"{self._partial.parent} has {free / 1e9:.1f} GB free; set TMPDIR to another "
                "disk, or give a shorter --text"
            )
        self._entries = (
            TensorEntry("tokens", "I32", tokens.shape, 0, tokens.nbytes),
            TensorEntry(
                "logits", dtype, (positions, vocabulary), tokens.nbytes, tokens.nbytes + size
            ),
        )
        self._size = len(render_header(self._entries, None)) + _ROOM
        self._file.write(b"\0" * (8 + self._size))
        self._file.write(tokens.tobytes())


@dataclass(frozen=True, slots=True)
class LogitsFile:
    """A readable logits file.

    Attributes:
        path: where it lies.
        dtype: of the logits.
        shape: positions, vocabulary.
        metadata: what `LogitsWriter.finish` was given.
        start: file offset of the first row.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, int]
    metadata: dict[str, Any]
    start: int

    @classmethod
    def open(cls, path: Path) -> LogitsFile:
        """Raises CheckpointError where `path` is no logits file."""
        header = read_header(path)
        try:
            logits = header.tensors["logits"]
            metadata = json.loads((header.metadata or {})["gemma_fold.diff"])
            positions, vocabulary = logits.shape
            dtype = _DTYPES[logits.dtype]
        except (KeyError, ValueError):
            raise CheckpointError(
                f"{path} is no logits file; make one with `gemma-fold diff --save-logits`"
            ) from None
        start = header.data_start + logits.start
        return cls(path, dtype, (positions, vocabulary), metadata, start)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) on the CPU."""
        width = self.shape[1] * self.dtype.itemsize
        buffer = bytearray((last - first) * width)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start + first * width)
            view = memoryview(buffer)
            while view and (n := file.readinto(view)):
                view = view[n:]
        if view:
            raise CheckpointError(f"{self.path} shrank while it was read; make it again")
        return torch.frombuffer(buffer, dtype=self.dtype).reshape(-1, self.shape[1])

    def check(self, *, tokens: str, model: str, dtype: str) -> None:
        """UsageError unless these are that model's logits, over those tokens, in that dtype."""
        made_in = str(self.metadata.get("dtype"))
        if self.metadata.get("tokens") != tokens:
            what = "of another text, --context or tokenizer"
        elif self.metadata.get("model") != model:
            what = f"of another model, {self.metadata.get('name')}"
        elif dtype not in ("auto", made_in):
            what = f"in {made_in}"
        else:
            return
        raise UsageError(f"{self.path} holds logits {what}; make them again with --save-logits")
