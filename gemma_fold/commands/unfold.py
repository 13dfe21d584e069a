"""`unfold`: turn a folded checkpoint back into the very bytes it came from."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from concurrent.futures import Future
from itertools import chain
from pathlib import Path

from gemma_fold.checkpoint.copy import hole_bytes
from gemma_fold.checkpoint.digest import (
    Digester,
    Part,
    digest_chunks,
    digest_parts,
    open_digester,
    tensor_parts,
    whole,
)
from gemma_fold.checkpoint.listing import below
from gemma_fold.checkpoint.progress import Progress
from gemma_fold.checkpoint.source import CONFIG, Checkpoint, WeightFile, read_tensor
from gemma_fold.checkpoint.staging import Staging, open_staging, settle, work_folder
from gemma_fold.checkpoint.target import check_replaceable, check_target, target_folder
from gemma_fold.checkpoint.transfer import Transfer
from gemma_fold.commands.card import as_source
from gemma_fold.commands.convert import ConversionReport
from gemma_fold.errors import CheckpointError
from gemma_fold.format.manifest import Manifest
from gemma_fold.format.names import MANIFEST
from gemma_fold.format.reader import (
    folded_in,
    open_folded,
    original_header,
    restore,
    untouched_runs,
)


def unfold(
    folded: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the source tree of the folded checkpoint `folded` into `out`, byte for byte.

    What was written is read back and compared with the source's digests before `out` appears.

    Args:
        folded: the folded checkpoint's folder.
        out: the folder to make; one that is not empty is never replaced.
        resume: continue an interrupted run.
        restart: discard an interrupted run and begin anew.
        progress: receives events.

    Raises:
        CheckpointError: a byte that the source had was changed since the conversion.
        UsageError, HostError: as `convert`.
    """
    root, target = Path(folded), target_folder(out)
    checkpoint, manifest, stored = as_source(*open_folded(root))
    check_target(root, checkpoint.paths(), target, [work_folder(target)])
    plan = _plan(root, manifest)
    settled = settle(target)
    progress = progress or Progress()
    progress.waiting("looking at what is there")
    if not resume or not (settled.plan == plan or _is_result(target, manifest)):
        check_replaceable(target, None)
        moved, notes = _write(checkpoint, manifest, stored, target, plan, resume, restart, progress)
    else:
        moved, notes = {}, ()
    warnings = [
        *settled.notes,
        *notes,
        *(
            f"{name} was not in the source and is left out"
            for name in sorted(set(checkpoint.others) - set(manifest.files) - {MANIFEST})
        ),
    ]
    if not manifest.has_digests:
        warnings.append(
            "converted without digests: the norms are the source's, the rest could not be checked"
        )
    return ConversionReport(
        out=target,
        model_type=manifest.model_type,
        tensors=len(manifest.tensors),
        elements=sum(tensor.shape[0] for tensor in manifest.tensors.values()),
        files=len(manifest.files),
        size=_size(manifest),
        copied=moved,
        warnings=tuple(warnings),
    )


def _plan(root: Path, manifest: Manifest) -> str:
    return digest_chunks(chain(manifest.chunks(), (os.fsencode(os.path.realpath(root)),)))


def _size(manifest: Manifest) -> int:
    return sum(file.size for file in manifest.files.values())


def _write(
    checkpoint: Checkpoint,
    manifest: Manifest,
    stored: Mapping[str, str],
    target: Path,
    plan: str,
    resume: bool,
    restart: bool,
    progress: Progress,
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Bytes by method of the copy ladder, and what the user should know."""
    size = _size(manifest)
    holes = sum(hole_bytes(file.path, file.state.size) for file in checkpoint.weights)
    with (
        open_digester() as digester,
        open_staging(
            target,
            plan,
            size=size - holes,
            resume=resume,
            restart=restart,
            files=manifest.files,
        ) as staging,
    ):
        proof = _Proof(staging, digester)
        transfer = Transfer(checkpoint.root, staging, progress, stored=stored)
        progress.start(size, len(manifest.files))
        for name in manifest.directories:
            staging.folder.make(name)
        for file in checkpoint.weights:
            if file.name in manifest.files:
                _write_unfolded(transfer, file, manifest)
                proof.begin(file.name, *_expected(manifest, file.name))
        for name, state in checkpoint.others.items():
            if name in manifest.files:
                transfer.copy(name, state)
                proof.begin(name, *_expected(manifest, name))
        if manifest.index_name is not None and manifest.index is not None:
            transfer.write(manifest.index_name, manifest.index.encode())
            proof.begin(manifest.index_name, *_expected(manifest, manifest.index_name))
        transfer.write(CONFIG, manifest.config.encode())
        proof.begin(CONFIG, *_expected(manifest, CONFIG))
        progress.finish()
        progress.waiting("checking what was written")
        proof.finish()
    return transfer.moved, staging.notes


def _expected(manifest: Manifest, name: str) -> tuple[tuple[Part, ...], dict[str, str]]:
    """The parts of a source file of which a digest is known, and the digests."""
    file = manifest.files[name]
    if file.header is None:
        digests = {} if file.blake3 is None else {"": file.blake3}
        return (whole(file.size) if digests else ()), digests
    header = original_header(file)
    digests = {t.name: t.blake3 for t in folded_in(header, manifest)} | dict(file.tensors or {})
    return tensor_parts(header, header.tensors.keys() - digests.keys()), digests


def _is_result(out: Path, manifest: Manifest) -> bool:
    """Whether `out` holds the source's files, byte for byte as far as digests are known."""
    if not out.is_dir():
        return False
    found = {n: out / n for n, status in below(out) if not stat.S_ISDIR(status.st_mode)}
    if found.keys() != manifest.files.keys():
        return False
    for name, path in found.items():
        parts, expected = _expected(manifest, name)
        with open(path, "rb", buffering=0) as stream:
            if os.fstat(stream.fileno()).st_size != manifest.files[name].size:
                return False
            if digest_parts(stream.fileno(), parts) != expected:
                return False
    return True


class _Proof:
    """Reads what was written back, on the other core, and compares it with the source's digests."""

    def __init__(self, staging: Staging, digester: Digester) -> None:
        self._staging = staging
        self._digester = digester
        self._pending: list[tuple[str, Mapping[str, str], Future[dict[str, str]]]] = []

    def begin(self, name: str, parts: tuple[Part, ...], expected: Mapping[str, str]) -> None:
        """Begin with a file that is written."""
        descriptor = self._staging.folder.read(name)
        try:
            self._pending.append((name, expected, self._digester.submit(descriptor, parts)))
        finally:
            os.close(descriptor)

    def finish(self) -> None:
        """CheckpointError if a byte is not the source's."""
        for name, expected, pending in self._pending:
            found = pending.result()
            wrong = [part for part in found if found[part] != expected[part]]
            if wrong:
                what = f"tensor {wrong[0]} of {name}" if wrong[0] else name
                raise CheckpointError(
                    f"{what} is not what the source had: the folded checkpoint was changed or is "
                    "damaged; `gemma-fold verify` finds where. Fold the original again"
                )


def _write_unfolded(transfer: Transfer, file: WeightFile, manifest: Manifest) -> None:
    original = manifest.files[file.name]
    if original.header is None:
        transfer.copy(file.name, file.state)
        return
    header = original_header(original)
    patches = {
        header.data_start + header.tensors[t.name].start: restore(t, read_tensor(file, t.name))
        for t in folded_in(header, manifest)
    }
    transfer.patch(
        file.name,
        file.state,
        header=header.raw,
        runs=untouched_runs(file.header, header, manifest),
        patches=patches,
        size=original.size,
    )
