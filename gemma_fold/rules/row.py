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


def value_at(config: Config, path: str) -> Any:
    """The value at a dotted path, or None."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True, slots=True)
class Test:
    """What a config value must be for zero-centred norms.

    words: as a sentence goes on after the name of the value. ask: True for zero-centred, False for
    plain, None for a value that is refused.
    """

    words: str
    ask: Callable[[Any], bool | None]


@dataclass(frozen=True, slots=True)
class Switch:
    """A config value that decides between zero-centred and plain.

    key: dotted path into the family's config. absent: the answer without the key. refusal: why a
    value is refused, where it is not simply one that nobody here has seen.
    """

    key: str
    test: Test
    absent: bool
    refusal: str = ""

    def is_zero_centred(self, config: Config) -> bool | None:
        """True, False, or None where the config says something that is refused."""
        value = value_at(config, self.key)
        return self.absent if value is None else self.test.ask(value)

    def condition(self) -> str:
        """When norms are zero-centred, in words."""
        return f"{self.key} {self.test.words}{' (or absent)' if self.absent else ''}"

    def refused(self, config: Config, model_type: str, norms: str) -> str:
        """The reason to give where `is_zero_centred` says None of these norms."""
        said = f"{model_type} with {self.key}={value_at(config, self.key)!r}"
        if self.refusal:
            return f"{said} cannot be folded: {self.refusal}"
        return (
            f"{said} is unknown, so nothing says whether {norms} zero-centred; "
            "add the value to its row"
        )


is_true = Test("is true", lambda value: value if isinstance(value, bool) else None)
is_positive = Test(
    "is above 0", lambda value: value > 0 if isinstance(value, int) and value >= 0 else None
)


def one_of(**answers: bool) -> Test:
    """A name, with the answer for each one known."""
    on = [name for name, answer in answers.items() if answer]
    words = f"is {' or '.join(on)}" if on else f"is not {' or '.join(answers)}"
    return Test(words, lambda value: answers.get(value) if isinstance(value, str) else None)


def mentions(word: str) -> Test:
    """A name, on where `word` is in it."""
    return Test(
        f"contains {word}",
        lambda value: word in value.lower() if isinstance(value, str) else None,
    )


@dataclass(frozen=True, slots=True)
class Norm:
    """Zero-centred tensors of a family.

    names: pattern below the family's root (from the top of the checkpoint if `absolute`).
    optional: may be absent. unless_false: required unless this config value is false.
    layer_types: only layers of these types have it, by the config's `layer_types`.
    layers: config path of the layer count where the family's own does not apply.
    kind: NOT_A_GAMMA for 1 + w that is no gain. fold, switch, evidence: where they differ from the
    family's own.
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
    """Norm-like tensors of a family that are not zero-centred, and why that is worth saying.

    names, absolute: as in `Norm`. names may be a prefix and `**`, for all norms of a part that no
    rule here is about.
    """

    names: str
    why: str
    kind: Kind = Kind.PLAIN
    absolute: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A model inside the model, with its own config and its own row.

    key: where its config sits. prefixes: where its tensors start. Its row is that of `model_type`,
    whatever its config says, where the wrapper's code does not ask; else that of its config's own
    `model_type`, or of `default` where it has none.
    """

    key: str
    prefixes: tuple[str, ...]
    model_type: str = ""
    default: str = ""

    def row(self, config: Config) -> str:
        """The `model_type` whose row answers for this part."""
        return self.model_type or str(config.get("model_type") or self.default)


@dataclass(frozen=True, slots=True)
class Converted:
    """What only a checkpoint has that another tool converted, adding the offset under old names.

    names: pattern below the family's root. last_dim: of its shape, where only the shape tells.
    tool: who converts like this.
    """

    names: str
    tool: str
    last_dim: int | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table.

    model_types: `model_type` values the row answers for. architectures: names that decide before
    `model_type` does. roots: what may stand before the names, one of them per checkpoint. parts:
    models inside, by their own rows. layers: config path of the layer count. draft_layers: config
    path of the number of draft (MTP) layers that follow them. switches: zero-centred only if all
    say so. converted: signs of norms folded already. all_plain: every norm outside of the parts is
    plain. refuse: why such a model cannot be folded at all.

    Two rows for one `model_type` are two layouts; the one with the most tensors answers.
    """

    model_types: tuple[str, ...]
    evidence: Evidence
    norms: tuple[Norm, ...] = ()
    plain: tuple[Plain, ...] = ()
    parts: tuple[Part, ...] = ()
    roots: tuple[str, ...] = ("model.", "")
    layers: str = "num_hidden_layers"
    draft_layers: str = ""
    fold: Fold = RMS_NORM
    switches: tuple[Switch, ...] = ()
    converted: tuple[Converted, ...] = ()
    architectures: tuple[str, ...] = ()
    all_plain: bool = False
    refuse: str = ""

    def condition(self, norm: Norm | None = None) -> str:
        """What the config has to say for these norms to be zero-centred; "" if it has no say."""
        own = [norm.switch] if norm and norm.switch else []
        return " and ".join(switch.condition() for switch in (*self.switches, *own))
