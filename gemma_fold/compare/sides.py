"""One side of a comparison: a checkpoint, what its norms hold, and where its bytes lie."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_fold.checkpoint import hub
from gemma_fold.checkpoint.header import Header, TensorEntry
from gemma_fold.checkpoint.locate import Source, hub_id, open_source
from gemma_fold.format.manifest import unwrap_config
from gemma_fold.format.names import MANIFEST, MODEL_TYPE
from gemma_fold.rules import Fold, Verdict, classify


@dataclass(frozen=True, slots=True)
class Side:
    """A checkpoint as `diff` sees it.

    Attributes:
        name: folder or Hub id as given.
        commit: of a Hub source.
        root: its folder; None if only headers were fetched.
        folded: whether its norms hold gamma, by its own config or manifest. Values never decide.
        config: the model's config; of a folded checkpoint, the original inside it.
        headers: by weight file.
        files: size of every other file, by relative path.
        folds: the arithmetic of every zero-centred norm, by tensor name.
        note: why `folds` is empty, if it is.
    """

    name: str
    commit: str | None
    root: Path | None
    folded: bool
    config: Mapping[str, Any]
    headers: Mapping[str, Header]
    files: Mapping[str, int]
    folds: Mapping[str, Fold]
    note: str

    def tensors(self) -> dict[str, tuple[str, TensorEntry]]:
        """Every tensor by name, with the weight file that holds it."""
        return {
            t.name: (f, t) for f, header in self.headers.items() for t in header.tensors.values()
        }


def open_side(source: Source) -> Side:
    """Open a folder, or download a Hub id and open its snapshot.

    Raises:
        CheckpointError: it is damaged, or not a checkpoint.
    """
    checkpoint = open_source(source)
    return _side(
        os.fspath(source),
        checkpoint.origin.commit,
        checkpoint.root,
        checkpoint.config,
        {file.name: file.header for file in checkpoint.weights},
        {name: state.size for name, state in checkpoint.others.items()},
    )


def open_headers(source: Source) -> Side:
    """The same from headers alone: nothing of a Hub id is downloaded but those."""
    found = hub_id(source)
    if found is None:
        return open_side(source)
    remote = hub.fetch_headers(*found)
    others = {n: size for n, size in remote.files.items() if n not in remote.headers}
    return _side(os.fspath(source), remote.commit, None, remote.config, remote.headers, others)


def original_config(
    config: Mapping[str, Any], files: Collection[str], where: Path
) -> tuple[Mapping[str, Any], bool]:
    """The original's config, and whether the checkpoint is folded: by its config or a manifest."""
    marked = config.get("model_type") == MODEL_TYPE
    base = unwrap_config(config, where) if marked else config
    return base, marked or MANIFEST in files


def _side(
    name: str,
    commit: str | None,
    root: Path | None,
    config: Mapping[str, Any],
    headers: Mapping[str, Header],
    files: Mapping[str, int],
) -> Side:
    base, folded = original_config(config, files, Path(name))
    shapes = {t.name: _squeeze(t.shape) for h in headers.values() for t in h.tensors.values()}
    found = classify(base, shapes)
    folds = {n: rule.fold for n, rule in found.zero_centred().items() if rule.fold is not None}
    note = "" if folds or found.verdict is Verdict.FOLDABLE else found.reason
    return Side(name, commit, root, folded, base, headers, files, folds, note)


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[H, 1] as [H]: the rules know norms by their original shape."""
    return shape[:1] if len(shape) == 2 and shape[1] == 1 else shape
