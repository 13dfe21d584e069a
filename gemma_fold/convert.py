"""`convert`: fold a checkpoint into format 1."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_fold.checkpoint import hub
from gemma_fold.checkpoint.output import check_space, check_target, open_staging
from gemma_fold.checkpoint.source import CONFIG, MANIFEST, Checkpoint, Origin, open_checkpoint
from gemma_fold.plan import Plan, WeightPlan, plan_conversion
from gemma_fold.progress import Progress
from gemma_fold.transfer import Transfer


@dataclass(frozen=True, slots=True)
class Report:
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


def load_source(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a folder, or download a Hub id (`org/name[@revision]`) and open its snapshot."""
    text = os.fspath(source)
    if not hub.looks_like_hub_id(text):
        return open_checkpoint(text)
    repo_id, revision = hub.parse_hub_id(text)
    path, commit = hub.download(repo_id, revision)
    return open_checkpoint(path, Origin(repo_id, repo_id, commit))


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tensor_lock: bool = True,
    resume: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Fold the checkpoint `source` into the folder `out`, in format 1.

    Every zero-centred norm weight w becomes float32 gamma = 1 + w (or the family's own offset)
    under its own name, with shape [H, 1], or [H] without `tensor_lock`; every other tensor and
    file keeps its bytes. `out` is absent or complete at any moment.

    Raises:
        UnsupportedModelError, NothingToFoldError: no rule covers this model.
        AlreadyFoldedError: the source holds gamma already.
        CheckpointError: the source is damaged, or changed while it was read.
        UsageError: `out` is in the way, or endangers the source.
        EnvironmentProblem: disk or permissions; what was done is kept for `resume`.
    """
    checkpoint = load_source(source)
    target = Path(out)
    check_target(checkpoint.root, target, marker=MANIFEST if force else None)
    plan = plan_conversion(checkpoint, tensor_lock=tensor_lock)
    if dry_run:
        return _report(plan, target, {})
    check_space(target.parent, plan.size)
    progress = progress or Progress()
    with open_staging(target, plan.digest(), resume=resume, force=force) as staging:
        transfer = Transfer(checkpoint.root, staging, progress)
        progress.start(plan.size, _file_count(plan))
        for item in plan.weights:
            _write_folded(transfer, item)
        _copy_others(transfer, plan.checkpoint, staging.path)
        if plan.index is not None and checkpoint.index_name is not None:
            transfer.write(checkpoint.index_name, plan.index)
        transfer.write(MANIFEST, plan.manifest_raw)
        transfer.write(CONFIG, plan.config)
        progress.finish()
    return _report(plan, target, transfer.moved)


def _file_count(plan: Plan) -> int:
    generated = 2 + (plan.index is not None)
    return len(plan.weights) + len(plan.checkpoint.others) + generated


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
    )


def _copy_others(transfer: Transfer, checkpoint: Checkpoint, staging: Path) -> None:
    for name in checkpoint.directories:
        (staging / name).mkdir(parents=True, exist_ok=True)
    for name, state in checkpoint.others.items():
        transfer.copy(name, state)


def _report(plan: Plan, out: Path, copied: Mapping[str, int]) -> Report:
    tensors = plan.manifest.tensors.values()
    return Report(
        out=out,
        model_type=plan.manifest.model_type,
        tensors=len(tensors),
        elements=sum(tensor.shape[0] for tensor in tensors),
        files=_file_count(plan),
        size=plan.size,
        copied=copied,
        warnings=plan.warnings,
    )
