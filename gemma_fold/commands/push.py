"""`push`: a folded checkpoint to the Hub, with a model card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_fold._version import __version__
from gemma_fold.checkpoint import hub
from gemma_fold.checkpoint.progress import Progress
from gemma_fold.checkpoint.source import CONFIG, Checkpoint
from gemma_fold.commands.card import (
    CARD,
    SOURCE_CARD,
    card,
    count,
    is_notice,
    metadata,
    was_pushed,
)
from gemma_fold.commands.verify import verify
from gemma_fold.errors import CheckpointError, UsageError
from gemma_fold.format.manifest import Manifest
from gemma_fold.format.names import MANIFEST
from gemma_fold.format.reader import open_folded


@dataclass(frozen=True, slots=True)
class PushReport:
    """What was pushed, or would be.

    Attributes:
        repo_id: the repository.
        url: of the commit, or of the pull request; None for what would be.
        commit: that was made, if any.
        pull_request: its number as a revision, such as refs/pr/1.
        files: that the commit holds.
        size: bytes in them.
        card: the text of the model card.
        warnings: what the user should know, a line each.
    """

    repo_id: str
    url: str | None
    commit: str | None
    pull_request: str | None
    files: int
    size: int
    card: str
    warnings: tuple[str, ...]


def push(
    folded: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    base_model: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Upload the folded checkpoint `folded` to the Hub repository `repo_id`, once it is verified.

    The repository is made if there is none. A model card is written for it; the source's own card
    goes along as README.source.md, which `unfold` gives back as README.md. The folder here stays as
    it is. An interrupted upload goes on where it was when it is run again.

    Args:
        folded: the folder.
        repo_id: org/name.
        private: make the repository private, if it is made.
        create_pr: open a pull request instead of committing to the main branch.
        base_model: the source on the Hub, if the manifest does not name it.
        dry_run: check everything and write the card, but ask and send nothing.
        progress: receives events.

    Raises:
        CheckpointError: not a folded checkpoint, or not as it was written.
        UsageError: no such name, or another model is there.
        HostError: the Hub cannot be reached, or does not let us in.
    """
    repo, revision = hub.parse_hub_id(repo_id)
    if revision is not None:
        raise UsageError(f"{repo_id} names a revision; push goes to the main branch of {repo}")
    progress = progress or Progress()
    report = verify(folded, progress=progress)
    if not report.ok:
        raise CheckpointError(
            f"{folded} is not pushed, for it is not as it was written ({report.problems[0]}); "
            "`gemma-fold verify` lists what differs"
        )
    checkpoint, manifest = open_folded(Path(folded))
    base = manifest.origin.repo_id or base_model
    if repo == base:
        raise UsageError(f"{repo} is the original's own repository; name another")
    progress.waiting("writing the card")
    source = metadata(checkpoint.root / (CARD if CARD in manifest.files else SOURCE_CARD))
    notices = [name for name in checkpoint.others if is_notice(name)]
    text = card(
        manifest, count(checkpoint, manifest), source, notices, repo_id=repo, base_model=base
    )
    files = _files(checkpoint, manifest, text)
    size = sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in files.values())
    warnings = [] if base else ["the source is not known on the Hub; name it with --base-model"]
    if not (source.get("license") or notices):
        warnings.append("neither a card nor a file of the source names its licence")
    if dry_run:
        return PushReport(repo, None, None, None, len(files), size, text, tuple(warnings))
    progress.finish()  # the client shows what it sends
    warnings += hub.prepare_repo(repo, private=private, create_pr=create_pr, marker=MANIFEST)
    with tempfile.TemporaryDirectory(prefix="gemma-fold-push-") as folder:
        _gather(Path(folder), files)
        made = hub.upload(
            repo,
            Path(folder),
            f"{manifest.origin.name}, folded by gemma-fold {__version__}",
            create_pr=create_pr,
        )
    return PushReport(
        repo,
        made.url,
        made.commit,
        made.pull_request,
        len(files),
        size,
        text,
        tuple(warnings),
    )


def _files(checkpoint: Checkpoint, manifest: Manifest, text: str) -> Mapping[str, Path | bytes]:
    """What the repository gets: by its name there, a file here or the bytes themselves."""
    names = [*checkpoint.others, *(file.name for file in checkpoint.weights), CONFIG]
    names += [checkpoint.index_name] if checkpoint.index_name else []
    files: dict[str, Path | bytes] = {name: checkpoint.root / name for name in names}
    known = {CARD, SOURCE_CARD} & manifest.files.keys()
    if SOURCE_CARD in files and known and not was_pushed(checkpoint, manifest):
        raise CheckpointError(
            f"{checkpoint.root} holds {SOURCE_CARD}, as the source's {CARD} is called when it "
            "is pushed; rename it in the source and fold that"
        )
    if CARD in manifest.files:
        entries = {(SOURCE_CARD if n == CARD else n): f for n, f in manifest.files.items()}
        entries[SOURCE_CARD] = replace(entries[SOURCE_CARD], name=SOURCE_CARD)
        files[SOURCE_CARD] = files[CARD]
        files[MANIFEST] = replace(manifest, files=entries).to_bytes()
    return files | {CARD: text.encode()}


def _gather(folder: Path, files: Mapping[str, Path | bytes]) -> None:
    """Lay out what is uploaded: links to the files here, and what is made for it."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.symlink_to(content.resolve())
