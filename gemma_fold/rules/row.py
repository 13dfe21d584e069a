"""The shape of one row of the table: a model family and how it stores its norms.

To add a family, copy the row nearest to it and change it. Patterns are whole tensor names: `{a,b}`
stands for either, `{,a.}` for an optional part, and `{i}` for an index. Nothing matches by suffix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gemma_fold.rules.model import Evidence, Fold, Kind

Config = Mapping[str, Any]

#: What nearly every family does: RMSNorm, 1 + w and the product in float32, one rounding.
RMS_NORM = Fold()

_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")
_INDEX = "\0"


@lru_cache(maxsize=4096)
def expand(pattern: str) -> tuple[str, ...]:
    """All names that a pattern stands for, `{i}` left in place."""
    pending, names = [pattern.replace("{i}", _INDEX)], []
    while pending:
        text = pending.pop(0)
        braces = _BRACES.search(text)
        if braces is None:
            names.append(text.replace(_INDEX, "{i}"))
            continue
        head, tail = text[: braces.start()], text[braces.end() :]
        pending.extend(head + choice + tail for choice in braces[1].split(","))
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class Switch:
    """A config value that decides between zero-centred and plain.

    key: dotted path into the family's config. test: True for zero-centred, False for plain, None
    for a value nobody here has seen, which is refused. absent: the answer without the key.
    """

    key: str
    test: Callable[[Any], bool | None]
    absent: bool | None
    why: str

    def is_zero_centred(self, config: Config) -> bool | None:
        value = lookup(config, self.key)
        return self.absent if value is None else self.test(value)


def is_true(value: Any) -> bool | None:
    """A switch test for plain booleans."""
    return value if isinstance(value, bool) else None


def one_of(**answers: bool) -> Callable[[Any], bool | None]:
    """A switch test for names: the answer for each, None for any other."""
    return answers.get


def lookup(config: Config, path: str) -> Any:
    """The value at a dotted path, or None."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True, slots=True)
class Norm:
    """Zero-centred tensors of a family.

    names: pattern below the family's root (from the top of the checkpoint if `absolute`).
    optional: may be absent. unless_false: required unless this config value is false.
    layer_types: only those layers have it, by the config's `layer_types`.
    layers: config path of the layer count where the family's own does not apply.
    fold, switch, evidence: where they differ from the family's own.
    """

    names: str
    fold: Fold | None = None
    optional: bool = False
    absolute: bool = False
    unless_false: str = ""
    layer_types: tuple[str, ...] = ()
    layers: str = ""
    kind: Kind = Kind.ZERO_CENTRED
    switch: Switch | None = None
    evidence: Evidence | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Plain:
    """Norm-like tensors of a family that are not zero-centred, and why that is worth saying."""

    names: str
    why: str
    absolute: bool = False
    kind: Kind = Kind.PLAIN


@dataclass(frozen=True, slots=True)
class Part:
    """A model inside the model, with its own config and its own row.

    key: where its config sits. prefixes: where its tensors start. default: its `model_type` where
    the config does not say.
    """

    key: str
    prefixes: tuple[str, ...]
    default: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table.

    model_types: `model_type` values the row answers for (`architectures` too, where these decide).
    roots: what may stand before the names, one of them per checkpoint. layers: config path of the
    layer count. past_last_layer: layers beyond it are draft (MTP) layers. refuse: why such a model
    cannot be folded at all. all_plain: every norm not inside a part is plain.
    """

    model_types: tuple[str, ...]
    evidence: Evidence
    norms: tuple[Norm, ...] = ()
    plain: tuple[Plain, ...] = ()
    parts: tuple[Part, ...] = ()
    roots: tuple[str, ...] = ("model.", "")
    layers: str = "num_hidden_layers"
    past_last_layer: bool = False
    fold: Fold = RMS_NORM
    switch: Switch | None = None
    architectures: tuple[str, ...] = ()
    all_plain: bool = False
    refuse: str = ""
    notes: tuple[str, ...] = ()
