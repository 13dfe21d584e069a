"""`convert`: fold a checkpoint into format 1."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_fold.checkpoint.arrivals import Arrivals, open_arrivals
from gemma_fold.checkpoint.digest import digest_text, open_digester, tensor_parts
from gemma_fold.checkpoint.listing import is_empty_or_absent
from gemma_fold.checkpoint.locate import hub_id, open_source
from gemma_fold.checkpoint.progress import Progress
from gemma_fold.checkpoint.source import CONFIG, Checkpoint, read_tensor
from gemma_fold.checkpoint.staging import Settled, Staging, open_staging, settle, work_folder
from gemma_fold.checkpoint.target import check_replaceable, check_target, target_folder
from gemma_fold.checkpoint.transfer import Transfer
from gemma_fold.commands.plan import Plan, WeightPlan, plan_conversion
from gemma_fold.errors import CheckpointError, UsageError
from gemma_fold.format.digests import check_unchanged
from gemma_fold.format.manifest import read_manifest
from gemma_fold.format.names import CONVERTED, MANIFEST
from gemma_fold.rules import classify


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
    by_shard: bool = False,
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
        by_shard: fetch a weight file of a Hub id when it is folded, and remove it then, so that the
            source is never on the disk as a whole, nor in the Hub's cache.
        progress: receives events.

    Raises:
        UnsupportedModelError, NothingToFoldError: no rule covers this model.
        AlreadyFoldedError: the source holds gamma already.
        CheckpointError: the source is damaged, or changed while it was read.
        UsageError: `out` is in the way, or endangers the source.
        HostError: disk or permissions; what was done is kept for `resume`.
    """
    progress = progress or Progress()
    target = target_folder(out)
    options = _Options(tensor_lock, resume, restart, force, digest, dry_run)
    if not by_shard:
        return _convert(open_source(source), None, target, options, progress)
    found = hub_id(source)
    if found is None:
        raise UsageError(f"{source} is a folder; only a Hub id can arrive shard by shard")
    progress.waiting("reading headers and norms")
    with open_arrivals(*found, target, _zero_centred) as arrivals:
        return _convert(arrivals.checkpoint, arrivals, target, options, progress)


@dataclass(frozen=True, slots=True)
class _Options:
    tensor_lock: bool
    resume: bool
    restart: bool
    force: bool
    digest: bool
    dry_run: bool


def _convert(
    checkpoint: Checkpoint,
    arrivals: Arrivals | None,
    target: Path,
    options: _Options,
    progress: Progress,
) -> ConversionReport:
    progress.waiting("reading norms")
    removable = _removable(target, force=options.force)
    check_target(checkpoint.root, checkpoint.paths(), target, removable)
    settled = Settled() if options.dry_run else settle(target)
    plan = plan_conversion(checkpoint, tensor_lock=options.tensor_lock)
    plan_id = plan.digest(digests_taken=options.digest, by_commit=arrivals is not None)
    size = plan.size(digests_taken=options.digest)
    if options.resume and (settled.plan == plan_id or plan.is_result(target)):
        return _report(plan, target, size, {}, settled.notes)
    replaced = check_replaceable(target, _replaceable(target) if options.force else None)
    if replaced is not None:
        progress.waiting(f"checking {target}, which will be replaced")
        check_unchanged(target)
    if options.dry_run:
        return _report(plan, target, size, {}, ())
    with (
        open_digester() as digester,
        open_staging(
            target,
            plan_id,
            size=size + (arrivals.largest if arrivals else -plan.holes()),
            resume=options.resume,
            restart=options.restart or options.force,
            files=plan.files(),
            replaced=replaced,
        ) as staging,
    ):
        digesting = digester if options.digest else None
        transfer = Transfer(checkpoint.root, staging, progress, digesting)
        progress.start(size + (arrivals.size if arrivals else 0), len(plan.files()))
        for number, item in enumerate(plan.weights, 1):
            if arrivals is None:
                _write_folded(transfer, item)
                continue
            progress.file(item.file.name, number)
            _write_folded(transfer, _arrived(arrivals, item, plan, staging, progress))
            arrivals.drop(item.file.name)
        _copy_others(transfer, plan.checkpoint, staging)
        if plan.index is not None and checkpoint.index_name is not None:
            transfer.write(checkpoint.index_name, plan.index)
        transfer.write(CONFIG, plan.config)
        manifest = plan.proven_manifest(transfer.digests if options.digest else {})
        transfer.write(MANIFEST, manifest.to_bytes())
        progress.finish()
    return _report(plan, target, size, transfer.moved, (*settled.notes, *staging.notes))


def _zero_centred(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Collection[str]:
    return classify(config, shapes).zero_centred()


def _arrived(
    arrivals: Arrivals, item: WeightPlan, plan: Plan, staging: Staging, progress: Progress
) -> WeightPlan:
    """`item` with its file whole, unless an earlier run was done with it."""
    file = item.file
    if staging.done(file.name) is not None:
        progress.advance(file.state.size)
        return item
    whole = replace(file, state=arrivals.bring(file.name, progress.advance))
    for name in item.gammas:
        if digest_text(read_tensor(whole, name)) != plan.manifest.tensors[name].blake3:
            raise CheckpointError(
                f"{name} of {plan.manifest.origin.name} came in two forms; run again with --restart"
            )
    return replace(item, file=whole)


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
