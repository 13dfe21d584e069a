"""`classify`: match every tensor of a checkpoint against the table.

Each model of the tree picks the one root that its tensors are under. From there on every name is
an exact string, up to the indices: a dict value_at, so 100,000 tensors take no time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gemma_fold.format.names import MODEL_TYPE
from gemma_fold.rules.layers import INDEX, Layers
from gemma_fold.rules.model import Classification, Kind, TensorRule, Verdict, shorten
from gemma_fold.rules.row import Family, Norm, expand, value_at
from gemma_fold.rules.tree import Node, Refused, build_tree, choose_layout, identify, templates

_NORM_LIKE = re.compile(r"norm|(?<![^._])ln(?=[._\d])|gamma", re.IGNORECASE)
_NOT_A_GAIN = re.compile(r"(?:^|[._])(?:bias|beta|running_mean|running_var|num_batches_tracked)$")


class _Folded(Exception):
    """The norms hold gamma already; the message says how that shows."""


@dataclass(slots=True)
class _Found:
    """What the models of the tree add up to.

    rules and limits: by template. areas: by prefix, the rule for norms that no template names;
    None where these are an error.
    """

    rules: dict[str, TensorRule] = field(default_factory=dict)
    limits: dict[str, int | None] = field(default_factory=dict)
    areas: dict[str, TensorRule | None] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)


def classify(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Classification:
    """Say of every tensor whether it is a zero-centred norm, and of the model whether it folds.

    config: the parsed config.json. shapes: tensor name -> shape, of the whole checkpoint. Decides
    by `model_type` (of the sub-config, for a model inside a wrapper) and by full names; never by a
    suffix and never by values. Raises nothing: see `Classification.require_foldable`.
    """
    model_type = identify(config)
    names: dict[str, list[str]] = {}
    for name in shapes:
        names.setdefault(INDEX.sub("{i}", name), []).append(name)
    try:
        if MODEL_TYPE in (model_type, *config):
            raise _Folded("config.json says so")
        nodes = build_tree(config, model_type)
        found = _Found()
        for node in nodes:
            _match(node, names, shapes, found)
    except Refused as refused:
        return _undecided(model_type, Verdict.UNSUPPORTED, str(refused), names)
    except _Folded as how:
        reason = f"the norms are folded already ({how}); use the checkpoint as it is"
        return _undecided(model_type, Verdict.ALREADY_FOLDED, reason, names)
    return _conclude(model_type, nodes, names, shapes, found)


def _undecided(
    model_type: str, verdict: Verdict, reason: str, names: Mapping[str, list[str]]
) -> Classification:
    rules = {
        name: rule
        for template, members in names.items()
        for rule in (TensorRule(Kind.OTHER, model_type, template),)
        for name in members
    }
    return Classification(model_type, verdict, reason, rules, decided=False)


# --- one model of the tree -----------------------------------------------------------------------


def _match(
    node: Node,
    names: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    found: _Found,
) -> None:
    if node.plain:
        row = node.layouts[0]
        rule = TensorRule(
            Kind.PLAIN, node.model_type, "", None, row.evidence, condition=row.condition()
        )
        for base in node.bases:
            found.areas.setdefault(base, rule)
        return
    row, root = choose_layout(node, names)
    _refuse_converted(row, root, names, shapes)
    found.areas[root] = None
    layers = Layers(node.config, row, root, names)
    for norm in row.norms:
        _match_norm(norm, node, row, root, layers, found)
    for trap in row.plain:
        rule = TensorRule(trap.kind, node.model_type, "", None, row.evidence, trap.why)
        for template in templates(trap, root):
            if template.endswith("**"):
                found.areas[template[:-2]] = rule
            else:
                found.rules.setdefault(template, rule)
    for path in layers.counted:
        found.notes[f"config.json has no {path}: its layers were counted in the tensors"] = None


def _refuse_converted(
    row: Family,
    root: str,
    names: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    for sign in row.converted:
        for template in expand(sign.names):
            for name in names.get(root + template, ()):
                if sign.last_dim is None or shapes[name][-1:] == (sign.last_dim,):
                    raise _Folded(f"{name} shows that {sign.tool} converted it")


def _match_norm(
    norm: Norm, node: Node, row: Family, root: str, layers: Layers, found: _Found
) -> None:
    required = not norm.optional
    if norm.unless_false and value_at(node.config, norm.unless_false) is False:
        required = False
    full = templates(norm, root)
    kind = _kind(norm, node, required or any(template in layers.names for template in full))
    rule = TensorRule(
        kind=kind,
        family=node.model_type,
        pattern="",
        fold=(norm.fold or row.fold) if kind is Kind.ZERO_CENTRED else None,
        evidence=norm.evidence or row.evidence,
        note=norm.note,
        condition=row.condition(norm),
    )
    for template in full:
        if template not in found.rules:
            found.rules[template] = rule
            found.limits[template] = layers.limit(norm)
        if required:
            found.missing.extend(_missing(template, norm, layers))
    if kind is Kind.NOT_A_GAMMA:
        found.notes[f"{root}{norm.names}: {norm.note}"] = None


def _kind(norm: Norm, node: Node, called_for: bool) -> Kind:
    if norm.switch is None:
        return norm.kind
    answer = norm.switch.is_zero_centred(node.config)
    if answer is None and called_for:  # what a model does not have decides nothing
        raise Refused(norm.switch.refused(node.config, node.model_type, f"{norm.names} is"))
    return norm.kind if answer else Kind.PLAIN


def _missing(template: str, norm: Norm, layers: Layers) -> Iterator[str]:
    present = set(layers.names.get(template, ()))
    if "{i}" not in template:
        wanted = [template]
    else:
        wanted = [template.replace("{i}", str(i), 1) for i in layers.required(norm)]
    return (name for name in wanted if name not in present)


# --- every tensor, and the whole -----------------------------------------------------------------


def _conclude(
    model_type: str,
    nodes: tuple[Node, ...],
    names: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    found: _Found,
) -> Classification:
    rules: dict[str, TensorRule] = {}
    unclassified: list[str] = []
    lengths = sorted({len(prefix) for prefix in found.areas}, reverse=True)
    for template, members in names.items():
        known = found.rules.get(template)
        limit = found.limits.get(template)
        area = _area(template, found.areas, lengths)
        other = TensorRule(Kind.OTHER, area.family if area else model_type, template)
        known = known and replace(known, pattern=template)
        area = area and replace(area, pattern=template)
        looks = _looks_like_norm(template)
        for name in members:
            if known is not None and _within(name, limit):
                rules[name] = known
            elif not looks or len(shapes[name]) != 1:
                rules[name] = other
            elif area is not None:
                rules[name] = area
            else:
                rules[name] = other
                unclassified.append(name)
    verdict, reason = _verdict(model_type, nodes, found, rules, tuple(unclassified))
    foldable = verdict is Verdict.FOLDABLE
    return Classification(
        model_type=model_type,
        verdict=verdict,
        reason=reason,
        rules={name: rules[name] for name in shapes},
        missing=tuple(found.missing) if foldable else (),
        unclassified=tuple(unclassified) if verdict is Verdict.UNSUPPORTED else (),
        notes=tuple(found.notes),
    )


def _looks_like_norm(name: str) -> bool:
    return _NORM_LIKE.search(name) is not None and _NOT_A_GAIN.search(name) is None


def _within(name: str, limit: int | None) -> bool:
    if limit is None:
        return True
    index = INDEX.search(name)
    return index is None or int(index[0]) < limit


def _area(
    name: str, areas: Mapping[str, TensorRule | None], lengths: list[int]
) -> TensorRule | None:
    """The rule of the innermost area that `name` lies in; `lengths` of all areas, longest first."""
    for length in lengths:
        if length <= len(name) and name[:length] in areas:
            return areas[name[:length]]
    return None


def _verdict(
    model_type: str,
    nodes: tuple[Node, ...],
    found: _Found,
    rules: Mapping[str, TensorRule],
    unclassified: tuple[str, ...],
) -> tuple[Verdict, str]:
    if all(rule.kind is not Kind.ZERO_CENTRED for rule in found.rules.values()):
        plain = [node for node in nodes if node.plain][-1]
        return Verdict.NOTHING_TO_FOLD, (
            f"{plain.model_type} stores plain gamma ({plain.plain}), so there is nothing to fold; "
            "use the checkpoint as it is"
        )
    if unclassified:
        return Verdict.UNSUPPORTED, (
            f"no rule says whether {shorten(unclassified)} of this {model_type} checkpoint is "
            "zero-centred; add it to its row in gemma_fold/rules/families"
        )
    if not found.missing and all(r.kind is not Kind.ZERO_CENTRED for r in rules.values()):
        return Verdict.UNSUPPORTED, (
            f"this {model_type} checkpoint has none of the norms in its row; "
            "fold the complete checkpoint"
        )
    return Verdict.FOLDABLE, f"every norm of this {model_type} checkpoint is known"
