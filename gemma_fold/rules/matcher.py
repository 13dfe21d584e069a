"""`classify`: match every tensor of a checkpoint against the table.

The model is a tree: a wrapper, the models inside it, each with its own config. Every node picks the
one root that its tensors are under; then each of its names is an exact string, up to the indices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma_fold.rules.model import Classification, Kind, TensorRule, Verdict, shorten
from gemma_fold.rules.row import Config, Family, Norm, Plain, expand, lookup
from gemma_fold.rules.table import BY_ARCHITECTURE, BY_MODEL_TYPE

FOLDED_MODEL_TYPE = "gemma_fold"

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")
_NORM_LIKE = re.compile(r"norm|(?<![^._])ln(?=[._\d])|gamma", re.IGNORECASE)
_NOT_A_GAIN = re.compile(r"(?:^|[._])(?:bias|beta|running_mean|running_var|num_batches_tracked)$")
_TEXT_PREFIXES = ("{,model.}{language_model,text_model,llm}.", "model.", "")


class _Refused(Exception):
    """The tree cannot be built; the message is the reason to give."""


@dataclass(frozen=True, slots=True)
class _Node:
    """One model of the tree. bases: what its tensors may start with, before the family's roots."""

    model_type: str
    config: Config
    families: tuple[Family, ...]
    bases: tuple[str, ...]

    @property
    def family(self) -> Family:
        return self.families[0]

    def stores_plain_gamma(self) -> bool:
        """No norm of its own is zero-centred. Raises _Refused where the config does not say."""
        family = self.family
        if family.switch is None:
            return family.all_plain
        answer = family.switch.is_zero_centred(self.config)
        if answer is None:
            value = lookup(self.config, family.switch.key)
            raise _Refused(
                f"{self.model_type} with {family.switch.key}={value!r} is unknown "
                f"({family.switch.why}), so nothing says whether its norms are zero-centred"
            )
        return not answer


@dataclass(slots=True)
class _Found:
    """What the nodes add up to."""

    rules: dict[str, TensorRule] = field(default_factory=dict)  # by template
    limits: dict[str, int | None] = field(default_factory=dict)  # template -> number of layers
    areas: dict[str, TensorRule | None] = field(default_factory=dict)  # prefix -> plain, or strict
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def classify(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Classification:
    """Say of every tensor whether it is a zero-centred norm, and of the model whether it folds.

    config: the parsed config.json. shapes: tensor name -> shape, of the whole checkpoint. Decides
    by `model_type` (of the sub-config, for models inside a wrapper) and by full names; never by a
    suffix and never by values. Raises nothing: see `Classification.require_foldable`.
    """
    model_type = str(config.get("model_type") or "")
    names = _group_by_template(shapes)
    if model_type == FOLDED_MODEL_TYPE or FOLDED_MODEL_TYPE in config:
        reason = (
            "config.json says that the norms are folded already; use the checkpoint as it is, "
            "or `gemma-fold unfold` it"
        )
        return _without_rules(model_type, Verdict.ALREADY_FOLDED, reason, names)
    try:
        nodes = tuple(_tree(config, model_type, ("",), "config.json"))
        plain = {id(node): node.stores_plain_gamma() for node in nodes}
        found = _Found()
        for node in nodes:
            _match_plain(node, found) if plain[id(node)] else _match(node, names, found)
    except _Refused as refusal:
        return _without_rules(model_type, Verdict.UNSUPPORTED, str(refusal), names)
    rules, unclassified = _decide(names, shapes, found)
    verdict, reason = _verdict(nodes, all(plain.values()), tuple(unclassified))
    return Classification(
        model_type=model_type,
        verdict=verdict,
        reason=reason,
        rules={name: rules[name] for name in shapes},
        missing=tuple(found.missing),
        unclassified=tuple(unclassified),
        notes=tuple(dict.fromkeys(found.notes)),
    )


def _group_by_template(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in shapes:
        names.setdefault(_INDEX.sub("{i}", name), []).append(name)
    return names


def _without_rules(
    model_type: str, verdict: Verdict, reason: str, names: Mapping[str, list[str]]
) -> Classification:
    rules = {
        name: TensorRule(Kind.OTHER, model_type, template)
        for template, members in names.items()
        for name in members
    }
    return Classification(model_type, verdict, reason, rules)


# --- the tree ------------------------------------------------------------------------------------


def _tree(config: Config, model_type: str, bases: tuple[str, ...], where: str) -> Iterator[_Node]:
    """The node and all nodes below it, children first: a part knows its tensors best."""
    families = _families(config, model_type, where)
    family = families[0]
    if family.refuse:
        raise _Refused(f"{model_type or where} cannot be folded: {family.refuse}")
    for key, sub, sub_type, prefixes in _parts(family, config):
        below = tuple(base + p for base in bases for prefix in prefixes for p in expand(prefix))
        yield from _tree(sub, sub_type, below, f"{key} of {model_type}")
    yield _Node(model_type, config, families, bases)


def _families(config: Config, model_type: str, where: str) -> tuple[Family, ...]:
    for architecture in config.get("architectures") or ():
        if architecture in BY_ARCHITECTURE:
            return BY_ARCHITECTURE[architecture]
    if model_type in BY_MODEL_TYPE:
        return BY_MODEL_TYPE[model_type]
    named = f"model_type {model_type!r}" if model_type else "no model_type"
    raise _Refused(
        f"{where} has {named}, for which there is no rule that says which norms are zero-centred; "
        "add a row to gemma_fold/rules"
    )


def _parts(family: Family, config: Config) -> Iterator[tuple[str, Config, str, tuple[str, ...]]]:
    """(key, sub-config, its model_type, prefixes) of each model inside this one."""
    for part in family.parts:
        sub = lookup(config, part.key)
        sub = sub if isinstance(sub, Mapping) else {}
        yield part.key, sub, str(sub.get("model_type") or part.default), part.prefixes
    if family.all_plain and not family.parts:
        for key, sub in config.items():
            if isinstance(sub, Mapping) and isinstance(sub.get("model_type"), str):
                yield key, sub, sub["model_type"], _usual_prefixes(key)


def _usual_prefixes(key: str) -> tuple[str, ...]:
    """Where wrappers that take any model put the one configured under `key`."""
    name = key.removesuffix("_config")
    if name in ("text", "llm", "language", "lm"):
        return _TEXT_PREFIXES
    return (f"{{,model.}}{name}.", f"{{,model.}}{name}_model.", f"{{,model.}}{name}_tower.")


# --- one node ------------------------------------------------------------------------------------


def _match_plain(node: _Node, found: _Found) -> None:
    family = node.family
    rule = TensorRule(Kind.PLAIN, node.model_type, "", None, family.evidence)
    for base in node.bases:
        found.areas.setdefault(base, rule)


def _match(node: _Node, names: Mapping[str, list[str]], found: _Found) -> None:
    family, root = _layout(node, names)
    found.areas[root] = None
    found.notes.extend(family.notes)
    layers = _LayerCount(node, family, root, names, found)
    for norm in family.norms:
        _match_norm(norm, node, family, root, layers, names, found)
    for trap in family.plain:
        rule = TensorRule(trap.kind, node.model_type, "", None, family.evidence, trap.why)
        for template in _templates(trap, root):
            found.rules.setdefault(template, rule)


def _layout(node: _Node, names: Mapping[str, list[str]]) -> tuple[Family, str]:
    """The row and the root with the most tensors; the first of each if none has any."""
    candidates = [
        (family, base + root)
        for family in node.families
        for base in node.bases
        for root in family.roots
    ]

    def hits(candidate: tuple[Family, str]) -> int:
        family, root = candidate
        lines: Iterable[Norm | Plain] = (*family.norms, *family.plain)
        return sum(
            t in names for line in lines if not line.absolute for t in _templates(line, root)
        )

    return max(candidates, key=hits)


def _templates(line: Norm | Plain, root: str) -> tuple[str, ...]:
    return expand(line.names) if line.absolute else tuple(root + n for n in expand(line.names))


def _match_norm(
    norm: Norm,
    node: _Node,
    family: Family,
    root: str,
    layers: _LayerCount,
    names: Mapping[str, list[str]],
    found: _Found,
) -> None:
    kind = norm.kind
    if norm.switch is not None:
        answer = norm.switch.is_zero_centred(node.config)
        if answer is None:
            raise _Refused(f"{node.model_type}: unknown value of {norm.switch.key}")
        kind = kind if answer else Kind.PLAIN
    rule = TensorRule(
        kind=kind,
        family=node.model_type,
        pattern="",
        fold=(norm.fold or family.fold) if kind is Kind.ZERO_CENTRED else None,
        evidence=norm.evidence or family.evidence,
        note=norm.note,
    )
    for template in _templates(norm, root):
        if template not in found.rules:
            found.rules[template] = rule
            found.limits[template] = layers.limit(norm)
        if _is_required(norm, node):
            found.missing.extend(_missing(template, norm, layers, names))
    if norm.note and kind is Kind.NOT_A_GAMMA:
        found.notes.append(f"{norm.names}: {norm.note}")


def _is_required(norm: Norm, node: _Node) -> bool:
    if norm.unless_false and lookup(node.config, norm.unless_false) is False:
        return False
    return not norm.optional


def _missing(
    template: str, norm: Norm, layers: _LayerCount, names: Mapping[str, list[str]]
) -> Iterator[str]:
    present = set(names.get(template, ()))
    if "{i}" not in template:
        wanted = [template]
    else:
        wanted = [template.replace("{i}", str(i), 1) for i in layers.indices(norm)]
    return (name for name in wanted if name not in present)


@dataclass(frozen=True, slots=True)
class _LayerCount:
    """How many layers a node has, and of which type."""

    node: _Node
    family: Family
    root: str
    names: Mapping[str, list[str]]
    found: _Found

    def count(self, norm: Norm) -> int:
        path = norm.layers or self.family.layers
        value = lookup(self.node.config, path)
        if isinstance(value, int):
            return value
        # Some configs leave out what equals their class default; the tensors are all there is.
        self.found.notes.append(f"config.json has no {path}; layers counted from the tensors")
        seen = [
            int(index[0])
            for line in self.family.norms
            if not line.absolute and (line.layers or self.family.layers) == path
            for template in _templates(line, self.root)
            for name in self.names.get(template, ())
            if (index := _INDEX.search(name))
        ]
        return max(seen, default=0) + 1

    def limit(self, norm: Norm) -> int | None:
        """Layers from here on are none that the row knows; None for no limit."""
        if norm.absolute or "{i}" not in norm.names or self.family.past_last_layer:
            return None
        return self.count(norm)

    def indices(self, norm: Norm) -> Iterable[int]:
        """The layers that must have this norm; none where the config does not say which."""
        count = self.count(norm)
        if not norm.layer_types:
            return range(count)
        types = _layer_types(self.node.config, count)
        return [i for i, kind in enumerate(types[:count]) if kind in norm.layer_types]


def _layer_types(config: Config, count: int) -> list[str]:
    types = config.get("layer_types") or config.get("layers_block_type")
    if isinstance(types, list):
        return types
    interval = config.get("full_attention_interval")
    if isinstance(interval, int) and interval > 0:
        return [
            "linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)
        ]
    return []


# --- every tensor --------------------------------------------------------------------------------


def _decide(
    names: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]], found: _Found
) -> tuple[dict[str, TensorRule], list[str]]:
    rules: dict[str, TensorRule] = {}
    unclassified: list[str] = []
    for template, members in names.items():
        known = found.rules.get(template)
        known = known and _named(known, template)
        limit = found.limits.get(template)
        other = TensorRule(Kind.OTHER, "", template)
        looks = _looks_like_norm(template)
        area = _area(template, found.areas) if looks and known is None else None
        for name in members:
            if known is not None and _within(name, limit):
                rules[name] = known
            elif not looks or len(shapes[name]) != 1:
                rules[name] = other
            elif area is not None:
                rules[name] = _named(area, template)
            else:
                rules[name] = other
                unclassified.append(name)
    return rules, unclassified


def _named(rule: TensorRule, template: str) -> TensorRule:
    return TensorRule(rule.kind, rule.family, template, rule.fold, rule.evidence, rule.note)


def _within(name: str, limit: int | None) -> bool:
    index = _INDEX.search(name) if limit is not None else None
    return index is None or limit is None or int(index[0]) < limit


def _looks_like_norm(name: str) -> bool:
    return _NORM_LIKE.search(name) is not None and _NOT_A_GAIN.search(name) is None


def _area(name: str, areas: Mapping[str, TensorRule | None]) -> TensorRule | None:
    """The plain rule of the innermost model that the name lies in, if that one is plain."""
    prefixes = [prefix for prefix in areas if name.startswith(prefix)]
    return areas[max(prefixes, key=len)] if prefixes else None


def _verdict(
    nodes: tuple[_Node, ...], all_plain: bool, unclassified: tuple[str, ...]
) -> tuple[Verdict, str]:
    top = nodes[-1]
    if all_plain:
        evidence = top.family.evidence
        reason = (
            f"{top.model_type} stores plain gamma ({evidence.how}: {evidence.source}), "
            "so there is nothing to fold; use the checkpoint as it is"
        )
        return Verdict.NOTHING_TO_FOLD, reason
    if unclassified:
        reason = (
            f"no rule says whether {shorten(unclassified)} of this {top.model_type} checkpoint "
            "is zero-centred; add it to the row in gemma_fold/rules"
        )
        return Verdict.UNSUPPORTED, reason
    return Verdict.FOLDABLE, f"every norm of this {top.model_type} checkpoint is known"
