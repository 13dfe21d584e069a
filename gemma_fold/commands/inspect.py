"""`inspect`: what a checkpoint's norms are, and what folding would change."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_fold.checkpoint import hub
from gemma_fold.checkpoint.header import TensorEntry
from gemma_fold.checkpoint.locate import Source, hub_id
from gemma_fold.checkpoint.source import Checkpoint, WeightFile, open_checkpoint, read_tensor
from gemma_fold.format.arithmetic import count_rounded, fold, is_foldable_dtype
from gemma_fold.rules import Classification, Evidence, Fold, Kind, TensorRule, Verdict, classify

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors whose names differ only in layer numbers.

    Attributes:
        pattern: the names, with numbers as `{i}`.
        count: tensors in the group.
        shapes: distinct shapes with their counts.
        dtypes: distinct dtypes with their counts.
        kind: what they are by the rule; None if no rule covers them.
        family: model type of the rule that decided.
        fold: the arithmetic, for zero-centred tensors.
        evidence: what the rule rests on.
        note: why it is a trap, or what else is special.
        elements: weights in the group.
        bf16_changes: elements a bf16 gamma would change; None if the norms were not read.
    """

    pattern: str
    count: int
    shapes: Mapping[tuple[int, ...], int]
    dtypes: Mapping[str, int]
    kind: Kind | None
    family: str
    fold: Fold | None
    evidence: Evidence | None
    note: str
    elements: int
    bf16_changes: int | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        source: folder or Hub id as given.
        commit: of a Hub source.
        classification: verdict, reason, missing and unclassified tensors.
        norms: groups of tensors that a rule covers, or that look like norms.
        others: tensors in all remaining groups.
        files: weight files.
        tensors: tensors in them.
        size: bytes of the tensor data.
    """

    source: str
    commit: str | None
    classification: Classification
    norms: tuple[Group, ...]
    others: int
    files: int
    tensors: int
    size: int

    @property
    def incomplete(self) -> bool:
        """Whether it could be folded, were it not for missing norms."""
        verdict = self.classification
        return verdict.verdict is Verdict.FOLDABLE and bool(verdict.missing)

    @property
    def bf16_changes(self) -> int | None:
        """Elements that a bf16 gamma would change in all; None if the norms were not read."""
        known = [g.bf16_changes for g in self.norms if g.bf16_changes is not None]
        return sum(known) if known else None


def inspect(source: Source) -> Inspection:
    """Which norms of a checkpoint are zero-centred, by which rule.

    Only headers and `config.json` are read, by range requests for a Hub id; in a local folder that
    can be folded the norm weights are read too, to count what bf16 would lose.

    Args:
        source: a folder or a Hub id (`org/name[@revision]`).

    Raises:
        CheckpointError: it is damaged or incomplete.
    """
    text = os.fspath(source)
    found = hub_id(source)
    if found is not None:
        return _inspect_hub(text, *found)
    checkpoint = open_checkpoint(source)
    classification = classify(checkpoint.config, checkpoint.shapes())
    changes = _bf16_changes(checkpoint, classification)
    entries = [t for f in checkpoint.weights for t in f.header.tensors.values()]
    return _summarize(
        text, checkpoint.origin.commit, classification, entries, len(checkpoint.weights), changes
    )


def _inspect_hub(text: str, repo_id: str, revision: str | None) -> Inspection:
    remote = hub.fetch_headers(repo_id, revision)
    entries = [t for header in remote.headers.values() for t in header.tensors.values()]
    classification = classify(remote.config, {t.name: t.shape for t in entries})
    return _summarize(text, remote.commit, classification, entries, len(remote.headers), {})


def _bf16_changes(checkpoint: Checkpoint, classification: Classification) -> dict[str, int]:
    if classification.verdict is not Verdict.FOLDABLE:
        return {}
    rules = classification.zero_centred()
    changes: dict[str, int] = {}
    for file in checkpoint.weights:
        chosen = [t for name, t in file.header.tensors.items() if name in rules]
        changes.update(_bf16_changes_of(file, chosen, rules))
    return changes


def _bf16_changes_of(
    file: WeightFile, chosen: Iterable[TensorEntry], rules: Mapping[str, TensorRule]
) -> dict[str, int]:
    changes = {}
    for tensor in chosen:
        rule = rules[tensor.name].fold
        if rule is not None and is_foldable_dtype(tensor.dtype):
            gamma = fold(read_tensor(file, tensor.name), tensor.dtype, rule)
            changes[tensor.name] = count_rounded(gamma, "BF16")
    return changes


@dataclass(slots=True)
class _Tally:
    rule: TensorRule | None
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    elements: int = 0
    changes: int | None = None

    def add(self, tensor: TensorEntry, changes: int | None) -> None:
        self.shapes[tensor.shape] += 1
        self.dtypes[tensor.dtype] += 1
        self.elements += math.prod(tensor.shape)
        if changes is not None:
            self.changes = (self.changes or 0) + changes

    def group(self, pattern: str) -> Group:
        rule = self.rule
        return Group(
            pattern=pattern,
            count=self.shapes.total(),
            shapes=self.shapes,
            dtypes=self.dtypes,
            kind=rule.kind if rule else None,
            family=rule.family if rule else "",
            fold=rule.fold if rule else None,
            evidence=rule.evidence if rule else None,
            note=rule.note if rule else "not covered by any rule",
            elements=self.elements,
            bf16_changes=self.changes,
        )


def _summarize(
    source: str,
    commit: str | None,
    classification: Classification,
    entries: list[TensorEntry],
    files: int,
    changes: Mapping[str, int],
) -> Inspection:
    tallies: dict[tuple[str, Kind | None], _Tally] = {}
    unclassified = set(classification.unclassified)
    others = 0
    for tensor in entries:
        rule = classification.rules[tensor.name]
        unknown = tensor.name in unclassified
        if rule.kind is Kind.OTHER and not unknown:
            others += 1
            continue
        key = (_NUMBER.sub("{i}", tensor.name), None if unknown else rule.kind)
        tally = tallies.setdefault(key, _Tally(None if unknown else rule))
        tally.add(tensor, changes.get(tensor.name))
    return Inspection(
        source=source,
        commit=commit,
        classification=classification,
        norms=tuple(tally.group(pattern) for (pattern, _), tally in tallies.items()),
        others=others,
        files=files,
        tensors=len(entries),
        size=sum(t.end - t.start for t in entries),
    )


def to_json(found: Inspection) -> dict[str, Any]:
    """Plain values for `inspect --json`."""
    verdict = found.classification
    return {
        "source": str(Path(found.source)) if found.commit is None else found.source,
        "commit": found.commit,
        "model_type": verdict.model_type,
        "verdict": "incomplete" if found.incomplete else verdict.verdict.value,
        "reason": verdict.reason,
        "missing": list(verdict.missing),
        "unclassified": list(verdict.unclassified),
        "notes": list(verdict.notes),
        "files": found.files,
        "tensors": found.tensors,
        "bytes": found.size,
        "bf16_gamma_changes": found.bf16_changes,
        "groups": [_group_json(group) for group in found.norms],
    }


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "pattern": group.pattern,
        "count": group.count,
        "elements": group.elements,
        "shapes": [{"shape": list(s), "count": n} for s, n in group.shapes.items()],
        "dtypes": dict(group.dtypes),
        "kind": group.kind.value if group.kind else "unclassified",
        "family": group.family,
        "norm": group.fold.norm if group.fold else None,
        "offset": group.fold.offset if group.fold else None,
        "add_dtype": group.fold.add_dtype if group.fold else None,
        "evidence": None
        if group.evidence is None
        else {"how": group.evidence.how, "source": group.evidence.source},
        "note": group.note,
        "bf16_gamma_changes": group.bf16_changes,
    }
