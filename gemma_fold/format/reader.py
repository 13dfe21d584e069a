"""Read a folded checkpoint: its manifest beside its weights, and what the source looked like."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gemma_fold.checkpoint.digest import digest_text
from gemma_fold.checkpoint.header import Header, parse_header
from gemma_fold.checkpoint.layout import Run, merge_runs
from gemma_fold.checkpoint.source import CONFIG, Checkpoint, open_checkpoint
from gemma_fold.errors import CheckpointError
from gemma_fold.format.arithmetic import decode
from gemma_fold.format.arithmetic import unfold as unfold_tensor
from gemma_fold.format.manifest import (
    FoldedTensor,
    Manifest,
    SourceFile,
    base_config,
    read_manifest,
)
from gemma_fold.format.names import MANIFEST


def open_folded(folder: Path) -> tuple[Checkpoint, Manifest]:
    """Open a folded checkpoint and its manifest; CheckpointError if they disagree."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; give a folded checkpoint's folder")
    manifest = read_manifest(folder)
    if manifest.intact is False:
        raise CheckpointError(
            f"{folder / MANIFEST} was changed since it was written; fold the original again"
        )
    checkpoint = open_checkpoint(folder, manifest.origin)
    base_config(folder)
    files = {file.name: file for file in checkpoint.weights}
    present = {*files, *checkpoint.others, CONFIG, checkpoint.index_name}
    for name in manifest.files:
        if name not in present:
            raise CheckpointError(f"{folder / name} is missing; fold the original again")
    check_gammas(manifest, {name: file.header for name, file in files.items()}, folder)
    return checkpoint, manifest


def check_gammas(manifest: Manifest, headers: Mapping[str, Header], folder: Path) -> None:
    """CheckpointError unless each tensor that `manifest` calls folded is, by the files' headers."""
    for tensor in manifest.tensors.values():
        header = headers.get(tensor.file)
        entry = header.tensors.get(tensor.name) if header else None
        shape = (*tensor.shape, 1) if manifest.tensor_lock else tensor.shape
        if entry is None or entry.dtype != "F32" or entry.shape != shape:
            found = "absent" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            raise CheckpointError(
                f"{tensor.name} in {folder / tensor.file} should be F32 {list(shape)} as "
                f"{MANIFEST} says, but is {found}; fold the original again"
            )


def restore(tensor: FoldedTensor, gamma: bytes) -> bytes:
    """The original bytes of a folded tensor.

    Raises:
        CheckpointError: `gamma` is no longer the one that was folded from them.
    """
    raw = unfold_tensor(decode(gamma, "F32"), tensor.dtype, tensor.fold, tensor.exceptions)
    if digest_text(raw) != tensor.blake3:
        raise CheckpointError(
            f"{tensor.name} is not the gamma that was folded from the original: it was changed, "
            "so its source bytes cannot be restored"
        )
    return raw


def original_header(original: SourceFile) -> Header:
    """The source's header of a rewritten weight file, from the manifest."""
    assert original.header is not None
    raw = original.header.encode()
    return parse_header(
        raw, data_size=original.size - 8 - len(raw), where=f"{MANIFEST} header of {original.name}"
    )


def folded_in(header: Header, manifest: Manifest) -> list[FoldedTensor]:
    """The folded tensors that a weight file's header names."""
    return [manifest.tensors[name] for name in header.tensors if name in manifest.tensors]


def untouched_runs(folded: Header, original: Header, manifest: Manifest) -> tuple[Run, ...]:
    """Byte runs of the folded file that are the source's own, by offset in both.

    Raises:
        CheckpointError: the two headers do not describe the same tensors.
    """
    if set(folded.tensors) != set(original.tensors):
        raise CheckpointError(
            f"the weight files and {MANIFEST} name different tensors; fold the original again"
        )
    pieces = []
    for name, before in original.tensors.items():
        after = folded.tensors[name]
        if name in manifest.tensors:
            continue
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            raise CheckpointError(
                f"tensor {name} is {after.dtype} {list(after.shape)}, but the manifest says "
                f"{before.dtype} {list(before.shape)}; fold the original again"
            )
        pieces.append(
            Run(
                folded.data_start + after.start,
                original.data_start + before.start,
                before.end - before.start,
            )
        )
    return merge_runs(pieces)
