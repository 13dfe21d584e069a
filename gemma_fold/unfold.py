"""`unfold`: turn a folded checkpoint back into the very bytes it came from."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from gemma_fold.checkpoint.output import check_space, check_target, open_staging
from gemma_fold.checkpoint.source import CONFIG, MANIFEST, WeightFile, read_tensor
from gemma_fold.convert import Report
from gemma_fold.folded import (
    open_folded,
    original_header,
    restore,
    untouched_runs,
)
from gemma_fold.manifest import Manifest, SourceFile
from gemma_fold.progress import Progress
from gemma_fold.transfer import Transfer


def unfold(
    folded: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the source tree of the folded checkpoint `folded` into `out`, byte for byte.

    `force` starts an interrupted run over; a non-empty `out` is never replaced. Raises as
    `convert` does, and CheckpointError where a gamma was changed since the conversion.
    """
    root, target = Path(folded), Path(out)
    checkpoint, manifest = open_folded(root)
    check_target(root, target, marker=None)
    weights = [
        (file, manifest.files[file.name])
        for file in checkpoint.weights
        if file.name in manifest.files
    ]
    others = {name: s for name, s in checkpoint.others.items() if name in manifest.files}
    size = sum(file.size for file in manifest.files.values())
    check_space(target.parent, size)
    plan = hashlib.sha256(manifest.to_bytes() + os.path.realpath(root).encode()).hexdigest()
    progress = progress or Progress()
    with open_staging(target, plan, resume=resume, force=force) as staging:
        transfer = Transfer(root, staging, progress)
        progress.start(size, len(manifest.files))
        for name in manifest.directories:
            (staging.path / name).mkdir(parents=True, exist_ok=True)
        for file, original in weights:
            _write_unfolded(transfer, file, original, manifest)
        for name, state in others.items():
            transfer.copy(name, state)
        if manifest.index_name is not None and manifest.index is not None:
            transfer.write(manifest.index_name, manifest.index.encode())
        transfer.write(CONFIG, manifest.config.encode())
        progress.finish()
    extra = sorted(set(checkpoint.others) - set(manifest.files) - {MANIFEST})
    return Report(
        out=target,
        model_type=manifest.model_type,
        tensors=len(manifest.tensors),
        elements=sum(tensor.shape[0] for tensor in manifest.tensors.values()),
        files=len(manifest.files),
        size=size,
        copied=transfer.moved,
        warnings=tuple(f"{name} was not in the source and is left out" for name in extra),
    )


def _write_unfolded(
    transfer: Transfer, file: WeightFile, original: SourceFile, manifest: Manifest
) -> None:
    if original.header is None:
        transfer.copy(file.name, file.state)
        return
    header = original_header(original)
    patches = {
        header.data_start + header.tensors[t.name].start: restore(t, read_tensor(file, t.name))
        for t in manifest.tensors.values()
        if t.file == file.name
    }
    transfer.patch(
        file.name,
        file.state,
        header=header.raw,
        runs=untouched_runs(file.header, header, manifest),
        patches=patches,
        size=original.size,
    )
