"""`convert`: fold a checkpoint into format 1."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_fold.checkpoint.digest import open_digester, tensor_parts
from gemma_fold.checkpoint.listing import is_empty_or_absent
from gemma_fold.checkpoint.locate import open_source
from gemma_fold.checkpoint.progress import Progress
from gemma_fold.checkpoint.source import CONFIG, Checkpoint
from gemma_fold.checkpoint.staging import Settled, Staging, open_staging, settle, work_folder
from gemma_fold.checkpoint.target import check_replaceable, check_target, target_folder
from gemma_fold.checkpoint.transfer import Transfer
from gemma_fold.commands.plan import Plan, WeightPlan, plan_conversion
from gemma_fold.errors import CheckpointError, UsageError
from gemma_fold.format.digests import check_unchanged
from gemma_fold.format.manifest import read_manifest
from gemma_fold.format.names import CONVERTED, MANIFEST


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What was written, or would be.

    Attributes:
        out: the folder.
        model_type: of the original.
        tensors: norms folded or unfolded.
        elements: weights in them.
        files: files written.
        size: bytes written.
        copied: bytes moved by each method of the copy ladder.
        warnings: what the user should know, a line each.
    """

    out: Path
    model_type: str
    tensors: int
    elements: int
    files: int
    size: int
    copied: Mapping[str, int]
    warnings: tuple[str, ...]


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tensor_lock: bool = True,
    resume: bool = False,
    restart: bool = False,
    force: bool = False,
    digest: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Fold the checkpoint `source` into the folder `out`, in format 1.

    Every zero-centred norm weight w becomes float32 gamma = 1 + w (or the family's own offset)
    under its own name, with shape [H, 1], or [H] without `tensor_lock`; every other tensor and
    file keeps its bytes. `out` is absent or complete at any moment.

    Args:
        source: a folder or a Hub id.
        out: the folder to make.
        tensor_lock: write gammas as [H, 1], which loaders unaware of the fold refuse.
        resume: continue an interrupted run.
        restart: discard an interrupted run and begin anew.
        force: replace `out` if it is a folded checkpoint that `convert` made, holds nothing
            else, and was not changed since, by its digests; it stays in place until the new one is
            complete. An interrupted run is discarded.
        digest: take a digest of every byte, for `verify` and `unfold`. Without, a reflinked copy
            reads nothing but the norms.
        dry_run: check everything, write nothing.
        progress: receives events.

    Raises:
        UnsupportedModelError, NothingToFoldError: no rule covers this model.
        AlreadyFoldedError: the source holds gamma already.
        CheckpointError: the source is damaged, or changed while it was read.
        UsageError: `out` is in the way, or endangers the source.
        HostError: disk or permissions; what was done is kept for `resume`.
    """
    progress = progress or Progress()
    checkpoint = open_source(source)
    progress.waiting("reading norms")
    target = target_folder(out)
    check_target(checkpoint.root, checkpoint.paths(), target, _removable(target, force=force))
    settled = Settled() if dry_run else settle(target)
    plan = plan_conversion(checkpoint, tensor_lock=tensor_lock)
    plan_id, size = plan.digest(digests_taken=digest), plan.size(digests_taken=digest)
    if resume and (settled.plan == plan_id or plan.is_result(target)):
        return _report(plan, target, size, {}, settled.notes)
    replaced = check_replaceable(target, _replaceable(target) if force else None)
    if replaced is not None:
        progress.waiting(f"checking {target}, which will be replaced")
        check_unchanged(target)
    if dry_run:
        return _report(plan, target, size, {}, ())
    with (
        open_digester() as digester,
        open_staging(
            target,
            plan_id,
            size=size - plan.holes(),
            resume=resume,
            restart=restart or force,
            files=plan.files(),
            replaced=replaced,
        ) as staging,
    ):
        transfer = Transfer(checkpoint.root, staging, progress, digester if digest else None)
        progress.start(size, len(plan.files()))
        for item in plan.weights:
            _write_folded(transfer, item)
        _copy_others(transfer, plan.checkpoint, staging)
        if plan.index is not None and checkpoint.index_name is not None:
            transfer.write(checkpoint.index_name, plan.index)
        transfer.write(CONFIG, plan.config)
        manifest = plan.proven_manifest(transfer.digests if digest else {})
        transfer.write(MANIFEST, manifest.to_bytes())
        progress.finish()
    return _report(plan, target, size, transfer.moved, (*settled.notes, *staging.notes))


def _removable(out: Path, *, force: bool) -> list[Path]:
    """Folders whose content a run may remove."""
    return [work_folder(out), *([out] if force and out.is_dir() else [])]


def _replaceable(out: Path) -> frozenset[str] | None:
    """The files of the folded checkpoint at `out`; None if `out` is absent or empty.

    Raises:
        UsageError: something else is there, or a checkpoint that cannot be made again.
    """
    if is_empty_or_absent(out):
        return None
    try:
        manifest = read_manifest(out)
    except CheckpointError as error:
        raise UsageError(
            f"{out} is not empty and not a folded checkpoint, so it is not replaced ({error}); "
            "name a new folder"
        ) from error
    if manifest.made_by != CONVERTED:
        raise UsageError(
            f"{out} was not made by `gemma-fold convert` and may be the only one of its kind, so "
            "it is not replaced; name a new folder"
        )
    return frozenset({*manifest.files, CONFIG, MANIFEST})


def _write_folded(transfer: Transfer, item: WeightPlan) -> None:
    file, layout = item.file, item.layout
    if layout is None:
        transfer.copy(file.name, file.state)
        return
    transfer.patch(
        file.name,
        file.state,
        header=layout.header,
        runs=layout.runs,
        patches={layout.offset(name): gamma for name, gamma in item.gammas.items()},
        size=layout.size,
        parts=tensor_parts(file.header, item.gammas),
    )


def _copy_others(transfer: Transfer, checkpoint: Checkpoint, staging: Staging) -> None:
    for name in checkpoint.directories:
        staging.folder.make(name)
    for name, state in checkpoint.others.items():
        transfer.copy(name, state)


def _report(
    plan: Plan, out: Path, size: int, copied: Mapping[str, int], notes: tuple[str, ...]
) -> ConversionReport:
    tensors = plan.manifest.tensors.values()
    return ConversionReport(
        out=out,
        model_type=plan.manifest.model_type,
        tensors=len(tensors),
        elements=sum(tensor.shape[0] for tensor in tensors),
        files=len(plan.files()),
        size=size,
        copied=copied,
        warnings=(*plan.warnings, *notes),
    )
