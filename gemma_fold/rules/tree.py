"""A checkpoint as a tree of models: a wrapper, the models inside it, each with its own config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from gemma_fold.rules.row import Config, Family, Norm, Plain, expand, value_at
from gemma_fold.rules.table import BY_ARCHITECTURE, BY_MODEL_TYPE

# A config that goes beyond these is broken; real ones nest three models.
_MOST_PREFIXES = 1000
_MOST_MODELS = 64
_DEEPEST = 16
_PATTERN = re.compile(r"[{},]")


class Refused(Exception):
    """The model cannot be folded; the message is the reason to give."""


@dataclass(frozen=True, slots=True)
class Node:
    """One model of the tree.

    layouts: its rows, of which `choose_layout` picks one. bases: what its tensors may start with,
    before the roots of the row. plain: what says that none of its own norms is zero-centred, if so.
    """

    model_type: str
    config: Config
    layouts: tuple[Family, ...]
    bases: tuple[str, ...]
    plain: str


def identify(config: Config) -> str:
    """The model type of a config.json, or "".

    Diffusers and LeRobot have keys of their own, which only serve to say why we refuse.
    """
    if config.get("model_type"):
        return str(config["model_type"])
    for key in ("_class_name", "type"):
        name = str(config.get(key) or "")
        if any(row.refuse for row in BY_MODEL_TYPE.get(name, ())):
            return name
    return ""


def build_tree(config: Config, model_type: str) -> tuple[Node, ...]:
    """All nodes, the models inside first and the whole last.

    Raises Refused where a `model_type` has no row, or its row refuses it.
    """
    nodes = tuple(islice(_nodes(config, model_type, ("",), "config.json", 0), _MOST_MODELS + 1))
    if len(nodes) > _MOST_MODELS:
        raise Refused(f"config.json describes more than {_MOST_MODELS} models in one")
    return nodes


def _nodes(
    config: Config, model_type: str, bases: tuple[str, ...], where: str, depth: int
) -> Iterator[Node]:
    layouts = _rows(config, model_type, where)
    row = layouts[0]
    if row.refuse:
        raise Refused(f"{model_type} cannot be folded: {row.refuse}")
    for key, sub, sub_type, prefixes in _parts(row, config):
        below = tuple(base + p for base in bases for prefix in prefixes for p in expand(prefix))
        if len(below) > _MOST_PREFIXES or depth == _DEEPEST:
            raise Refused(f"{where} nests one model in another too often to be a real config")
        yield from _nodes(sub, sub_type, below, f"{key} of {model_type}", depth + 1)
    yield Node(model_type, config, layouts, bases, _why_plain(row, model_type, config))


def choose_layout(node: Node, names: Mapping[str, list[str]]) -> tuple[Family, str]:
    """The row and the full root with the most tensors in `names`; the first of each if none has."""
    candidates = [
        (row, base + root) for row in node.layouts for base in node.bases for root in row.roots
    ]

    def hits(candidate: tuple[Family, str]) -> int:
        row, root = candidate
        lines: list[Norm | Plain] = [*row.norms, *row.plain]
        return sum(
            template in names
            for line in lines
            if not line.absolute
            for template in templates(line, root)
        )

    return max(candidates, key=hits)


def templates(line: Norm | Plain, root: str) -> tuple[str, ...]:
    """The full names of a line of a row, `{i}` for each index."""
    if line.absolute:
        return expand(line.names)
    return tuple(root + name for name in expand(line.names))


def _rows(config: Config, model_type: str, where: str) -> tuple[Family, ...]:
    architectures = config.get("architectures")
    for architecture in architectures if isinstance(architectures, list) else ():
        if isinstance(architecture, str) and architecture in BY_ARCHITECTURE:
            return BY_ARCHITECTURE[architecture]
    if model_type in BY_MODEL_TYPE:
        return BY_MODEL_TYPE[model_type]
    if not model_type:
        raise Refused(
            f"{where} has no model_type, so no rule can say which norms are zero-centred; "
            "fold a checkpoint in Hugging Face layout"
        )
    raise Refused(
        f"{where} has model_type {model_type!r}, for which no rule says which norms are "
        "zero-centred; add a row to gemma_fold/rules/families"
    )


def _parts(row: Family, config: Config) -> Iterator[tuple[str, Config, str, tuple[str, ...]]]:
    """(key, sub-config, its model_type, prefixes) of each model inside."""
    for part in row.parts:
        sub = value_at(config, part.key)
        sub = sub if isinstance(sub, Mapping) else {}
        yield part.key, sub, part.row(sub), part.prefixes
    if row.all_plain:
        for key, sub in config.items():
            if isinstance(sub, Mapping) and isinstance(sub.get("model_type"), str):
                if _PATTERN.search(key):
                    raise Refused(f"config.json has a model under {key!r}, which is not a name")
                yield key, sub, sub["model_type"], _usual_prefixes(key)


def _usual_prefixes(key: str) -> tuple[str, ...]:
    """Where wrappers that take any model put the one configured under `key`."""
    name = key.removesuffix("_config")
    if name in ("text", "llm", "language", "lm"):
        return ("{,model.}{language_model,text_model,llm}.", "model.", "")
    return (f"{{,model.}}{name}{{,_model,_tower}}.",)


def _why_plain(row: Family, model_type: str, config: Config) -> str:
    for switch in row.switches:
        answer = switch.is_zero_centred(config)
        value = value_at(config, switch.key)
        if answer is None:
            raise Refused(switch.refused(config, model_type, "its norms are"))
        if not answer:
            said = f"has no {switch.key}" if value is None else f"says {switch.key}={value!r}"
            return f"config.json {said}"
    return f"{row.evidence.how}: {row.evidence.source}" if row.all_plain else ""
