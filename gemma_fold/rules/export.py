"""The table as plain values, for JSON: what converters in any language can read.

`rules.json`, beside this file, is what `export` gives, and `rules.schema.json` is its JSON Schema;
`make docs` writes both. `SCHEMA` grows when a key changes its meaning or goes away.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gemma_fold.rules.answer import WRAPPERS, RuleKind, kind_of
from gemma_fold.rules.classes import CLASSES, NormClass
from gemma_fold.rules.model import Evidence, Fold, Kind
from gemma_fold.rules.row import Family, Norm, Part, Plain, expand
from gemma_fold.rules.table import TABLE

SCHEMA = 1
FamilyKind = Literal["zero_centred", "plain", "wrapper", "refused"]


@dataclass(frozen=True, slots=True)
class ExportedNorm:
    """Tensors of a family that have one rule.

    Attributes:
        pattern: `names` in short: `{a,b}` stands for either, `{,a.}` for an optional part.
        names: below the family's root, `{i}` for each index; a name that ends in `**` stands for
            every norm of that part.
        from_top: whether they are below no root, but whole.
        kind: as in `gemma_fold.rules.Rule`.
        fold: the arithmetic of the gain, offset + w; null where nothing is added.
        required: whether a checkpoint has to have them.
        layer_types: the types of layers that have them, if not all do.
        condition: what the config has to say for zero-centred, where it has a say.
        evidence: where it is not the family's own.
        note: why, where the name misleads.
    """

    pattern: str
    names: tuple[str, ...]
    from_top: bool
    kind: RuleKind
    fold: Fold | None = None
    required: bool = False
    layer_types: tuple[str, ...] = ()
    condition: str = ""
    evidence: Evidence | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class ExportedPart:
    """A model inside the model.

    Attributes:
        key: where its config sits in that of the whole.
        prefixes: where its tensors start.
        model_type: whose rules answer; empty where its own config says so.
        default: whose rules answer where its config does not say.
    """

    key: str
    prefixes: tuple[str, ...]
    model_type: str
    default: str


@dataclass(frozen=True, slots=True)
class ExportedFamily:
    """One row of the table.

    Attributes:
        model_types: values of `model_type` in config.json that it answers for.
        architectures: values of `architectures` that decide before `model_type` does.
        kind: zero_centred: it has such norms; plain: no norm of its own is zero-centred, and each
            model that its config has inside is decided by its own model_type; wrapper: the same,
            and `parts` says where these models are; refused: see `reason`.
        reason: why it is refused.
        roots: what may stand before the names of norms, one of them in each checkpoint.
        condition: what the config has to say for zero-centred, where it has a say.
        norms: its norms, those that only look zero-centred too.
        parts: models inside, with rows of their own.
        evidence: file and line of released code.
    """

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    kind: FamilyKind
    reason: str
    roots: tuple[str, ...]
    condition: str
    norms: tuple[ExportedNorm, ...]
    parts: tuple[ExportedPart, ...]
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class ExportedClass:
    """A norm class of transformers that adds to its weight.

    Attributes:
        name: of the class.
        kind: as in `gemma_fold.rules.Rule`.
        fold: the arithmetic of its gain; null where 1 + w is no gain.
        evidence: its file and line.
    """

    name: str
    kind: RuleKind
    fold: Fold | None
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Export:
    """All rules.

    Attributes:
        schema: version of this form.
        families: two with one model type are two layouts of it.
        wrappers: model types of plain families that have a model of any family inside.
        classes: norm classes by name.
    """

    schema: int
    families: tuple[ExportedFamily, ...]
    wrappers: tuple[str, ...]
    classes: tuple[ExportedClass, ...]


def export() -> Export:
    """The whole table."""
    families = tuple(map(_family, TABLE))
    return Export(SCHEMA, families, tuple(sorted(WRAPPERS)), tuple(map(_class, CLASSES)))


def export_of(name: str) -> Export:
    """The rows that answer for a model type or an architecture; none where none does."""
    rows = (row for row in TABLE if name in (*row.model_types, *row.architectures))
    return Export(SCHEMA, tuple(map(_family, rows)), (name,) if name in WRAPPERS else (), ())


def similar(name: str) -> list[str]:
    """Model types and architectures with a row whose names are like this one, the nearest first."""
    known = [key for row in TABLE for key in (*row.model_types, *row.architectures)]
    return get_close_matches(name, known, n=3)


def plain_values(value: Any) -> Any:
    """`value` as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_values(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [plain_values(each) for each in value] if isinstance(value, tuple) else value


def _family(row: Family) -> ExportedFamily:
    return ExportedFamily(
        model_types=row.model_types,
        architectures=row.architectures,
        kind=_family_kind(row),
        reason=row.refuse,
        roots=row.roots if row.norms or row.plain else (),
        condition=row.condition(),
        norms=(*(_norm(row, n) for n in row.norms), *map(_trap, row.plain)),
        parts=tuple(map(_part, row.parts)),
        evidence=row.evidence,
    )


def _family_kind(row: Family) -> FamilyKind:
    if row.refuse:
        return "refused"
    if row.all_plain:
        return "plain"
    return "zero_centred" if row.norms else "wrapper"


def _norm(row: Family, norm: Norm) -> ExportedNorm:
    fold = (norm.fold or row.fold) if norm.kind is Kind.ZERO_CENTRED else None
    return ExportedNorm(
        pattern=norm.names,
        names=expand(norm.names),
        from_top=norm.absolute,
        kind=kind_of(norm.kind, fold),
        fold=fold,
        required=not norm.optional,
        layer_types=norm.layer_types,
        condition=row.condition(norm),
        evidence=norm.evidence,
        note=norm.note,
    )


def _trap(trap: Plain) -> ExportedNorm:
    kind = kind_of(trap.kind, None)
    return ExportedNorm(trap.names, expand(trap.names), trap.absolute, kind, note=trap.why)


def _part(part: Part) -> ExportedPart:
    prefixes = dict.fromkeys(p for prefix in part.prefixes for p in expand(prefix))
    return ExportedPart(part.key, tuple(prefixes), part.model_type, part.default)


def _class(row: NormClass) -> ExportedClass:
    return ExportedClass(row.name, kind_of(row.kind, row.fold), row.fold, row.evidence)


# --- JSON Schema ---------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """The JSON Schema of `export`, from the types above."""
    found: dict[str, Any] = {}
    _object(Export, found)
    top = found.pop("Export")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Zero-centred norms by model type",
        **top,
        "$defs": dict(sorted(found.items())),
    }


def _object(cls: type[Any], found: dict[str, Any]) -> None:
    """Add the schema of a dataclass, and of those in it, to `found`."""
    found[cls.__name__] = {}
    hints = get_type_hints(cls)
    found[cls.__name__] = {
        "type": "object",
        "properties": {name: _type(hint, found) for name, hint in hints.items()},
        "required": list(hints),
        "additionalProperties": False,
    }


def _type(hint: Any, found: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _type(arguments[0], found)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(each, found) for each in arguments]}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in found:
            _object(hint, found)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    return {"type": names[hint]}


def counted(families: Iterable[ExportedFamily]) -> dict[str, int]:
    """How many model types there are of each kind."""
    kinds: dict[str, set[str]] = {}
    for family in families:
        kinds.setdefault(family.kind, set()).update(family.model_types or family.architectures)
    return {kind: len(names) for kind, names in kinds.items()}
