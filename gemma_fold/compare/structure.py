"""Differences in headers and configs; no tensor data is read, so size does not matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_fold.checkpoint.header import TensorEntry
from gemma_fold.compare.sides import Side
from gemma_fold.format.names import MANIFEST

_ABSENT = "(absent)"
#: Keys that do not change what the model computes.
_BOOKKEEPING = frozenset({"transformers_version", "_name_or_path", "_commit_hash"})


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is different.

    Attributes:
        name: of a tensor, a config key or a file.
        a: what it is on side A.
        b: what it is on side B.
    """

    name: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class Structure:
    """The outcome of the header-only comparison.

    Attributes:
        tensors: names on both sides.
        only_in_a, only_in_b: tensors that the other side lacks.
        forms: tensors whose dtype or shape differs for another reason than the fold.
        folded_forms: norms that are F32 [H, 1] or [H] on the folded side, as a fold makes them.
        moved: tensors in another weight file. No difference to any loader.
        config: config keys with different values.
        config_notes: the same for keys that do not change the model.
        files: other files that only one side has, or that differ in size.
        vocabulary: rows of the token embedding on either side, if the configs have it.
    """

    tensors: int
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    forms: tuple[Change, ...]
    folded_forms: int
    moved: tuple[Change, ...]
    config: tuple[Change, ...]
    config_notes: tuple[Change, ...]
    files: tuple[Change, ...]
    vocabulary: tuple[int | None, int | None]

    @property
    def same(self) -> bool:
        """Whether nothing differs that a loader or a model would notice."""
        return not (self.only_in_a or self.only_in_b or self.forms or self.config)


def compare_structure(a: Side, b: Side) -> Structure:
    """Compare names, dtypes, shapes, weight files and configs of two sides."""
    in_a, in_b = a.tensors(), b.tensors()
    shared = [name for name in in_a if name in in_b]
    changed = [n for n in shared if _form(in_a[n][1]) != _form(in_b[n][1])]
    by_fold = {n for n in changed if _is_fold(n, a, b, in_a[n][1], in_b[n][1])}
    config, notes = _compare_configs(a.config, b.config)
    return Structure(
        tensors=len(shared),
        only_in_a=tuple(n for n in in_a if n not in in_b),
        only_in_b=tuple(n for n in in_b if n not in in_a),
        forms=tuple(
            Change(n, _form(in_a[n][1]), _form(in_b[n][1])) for n in changed if n not in by_fold
        ),
        folded_forms=len(by_fold),
        moved=tuple(Change(n, in_a[n][0], in_b[n][0]) for n in shared if in_a[n][0] != in_b[n][0]),
        config=config,
        config_notes=notes,
        files=_compare_files(a.files, b.files),
        vocabulary=(vocabulary_size(a.config), vocabulary_size(b.config)),
    )


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """`vocab_size` of a config or of its text part, or None."""
    for part in (config, config.get("text_config"), config.get("decoder")):
        if isinstance(part, Mapping) and isinstance(part.get("vocab_size"), int):
            return int(part["vocab_size"])
    return None


def _form(tensor: TensorEntry) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _is_fold(name: str, a: Side, b: Side, in_a: TensorEntry, in_b: TensorEntry) -> bool:
    """Whether a fold, done or undone, explains the change of dtype and shape."""
    if name not in a.folds and name not in b.folds:
        return False
    for side, tensor, other in ((a, in_a, in_b), (b, in_b, in_a)):
        if side.folded and tensor.dtype == "F32" and tensor.shape[:1] == other.shape[:1]:
            return True
    return False


def _compare_configs(
    a: Mapping[str, Any], b: Mapping[str, Any]
) -> tuple[tuple[Change, ...], tuple[Change, ...]]:
    flat_a, flat_b = _flatten(a), _flatten(b)
    changes: list[Change] = []
    notes: list[Change] = []
    for key in sorted({*flat_a, *flat_b}):
        one, two = flat_a.get(key, _ABSENT), flat_b.get(key, _ABSENT)
        if one != two:
            kept = notes if key.split(".")[-1] in _BOOKKEEPING else changes
            kept.append(Change(key, str(one), str(two)))
    return tuple(changes), tuple(notes)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            # Two spellings of one setting.
            flat[prefix + ("dtype" if key == "torch_dtype" else key)] = value
    return flat


def _compare_files(a: Mapping[str, int], b: Mapping[str, int]) -> tuple[Change, ...]:
    changes = []
    for name in sorted({*a, *b} - {MANIFEST}):
        one, two = a.get(name), b.get(name)
        if one != two:
            changes.append(Change(name, _bytes(one), _bytes(two)))
    return tuple(changes)


def _bytes(size: int | None) -> str:
    return _ABSENT if size is None else f"{size} bytes"
