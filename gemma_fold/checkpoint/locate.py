"""Where a checkpoint is: a folder, or a Hub id such as `org/name` or `org/name@revision`."""

from __future__ import annotations

import os
from pathlib import Path

from gemma_fold.checkpoint import hub
from gemma_fold.checkpoint.source import Checkpoint, Origin, open_checkpoint

Source = str | os.PathLike[str]


def hub_id(source: Source) -> tuple[str, str | None] | None:
    """Repository and revision of a Hub id; None for anything else, or what exists as a path."""
    text = os.fspath(source)
    return hub.parse_hub_id(text) if hub.looks_like_hub_id(text) else None


def fetch(source: Source) -> tuple[Path, Origin | None]:
    """The folder itself, or the snapshot of a Hub id, downloaded if it is not in the cache.

    Raises:
        CheckpointError: no such model or revision on the Hub.
        HostError: the Hub cannot be reached, or its cache cannot be written.
    """
    found = hub_id(source)
    if found is None:
        return Path(source), None
    repo_id, revision = found
    path, commit = hub.download(repo_id, revision)
    return path, Origin(repo_id, repo_id, commit)


def open_source(source: Source) -> Checkpoint:
    """Open a folder or, downloaded first, a Hub id.

    Raises:
        CheckpointError: damaged, incomplete, or not a safetensors checkpoint.
        HostError: the Hub cannot be reached, or its cache cannot be written.
    """
    folder, origin = fetch(source)
    return open_checkpoint(folder, origin)
