"""A report as text for terminals, as Markdown for model cards and pull requests, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from gemma_fold.compare.outputs.results import PERCENTILES
from gemma_fold.compare.report import tables
from gemma_fold.compare.report.tables import Table
from gemma_fold.compare.report.verdict import DiffReport
from gemma_fold.text import table as padded

SCHEMA = 1
"""Version of the JSON: it grows when a key changes its meaning or goes away."""

_BAR = 40


def text(report: DiffReport) -> str:
    """What `gemma-fold diff` prints."""
    lines = [tables.side("A", report.a), tables.side("B", report.b), ""]
    lines += [*tables.structure_lines(report), ""] if report.structure else []
    for item in _tables(report):
        if item.rows:
            lines += [padded(item.header, item.rows), ""]
        if item.title == "Norms" and report.weights and report.weights.max_ulp:
            lines += [*_histogram(report), ""]
    lines += [f"note: {note}" for note in notes(report)]
    lines.append(report.verdict.line)
    if len(report.verdict.reasons) > 3:
        lines += [f"  also: {reason}" for reason in report.verdict.reasons[3:]]
    return "\n".join(lines)


def markdown(report: DiffReport) -> str:
    """The same for a model card or a pull request."""
    lines = [
        f"**{report.verdict.line}**",
        "",
        f"- {_code(tables.side('A', report.a))}",
        f"- {_code(tables.side('B', report.b))}",
        *(f"- {line}" for line in tables.structure_lines(report)),
        *(f"- {note}" for note in notes(report)),
        "",
    ]
    for item in _tables(report):
        if item.rows:
            lines += [f"### {item.title}", "", *markdown_table(item), ""]
    lines.append(", ".join(f"{key} {value}" for key, value in report.environment.items()))
    return "\n".join(lines)


def to_json(report: DiffReport) -> dict[str, Any]:
    """Plain values, with `schema` first. NaN and infinity become null."""
    structure, weights, outputs = report.structure, report.weights, report.outputs
    return {
        "schema": SCHEMA,
        "same": report.verdict.same,
        "comparable": report.verdict.comparable,
        "verdict": report.verdict.line,
        "reasons": list(report.verdict.reasons),
        "notes": list(report.notes),
        "a": dataclasses.asdict(report.a),
        "b": dataclasses.asdict(report.b),
        "limits": dataclasses.asdict(report.limits),
        "structure": plain(dataclasses.asdict(structure)) if structure else None,
        "weights": _weights_json(report) if weights else None,
        "outputs": _outputs_json(report) if outputs else None,
        "environment": dict(report.environment),
    }


def _weights_json(report: DiffReport) -> dict[str, Any]:
    weights = report.weights
    assert weights is not None
    return {
        "counts": {found.value: count for found, count in weights.counts.items()},
        "bytes_compared": weights.compared,
        "norm_weights": weights.elements,
        "norm_weights_changed": weights.changed,
        "max_ulp": weights.max_ulp,
        "ulp_histogram": list(weights.histogram),
        "files_differ": list(weights.files),
        "norms": [_tensor_json(tensor) for tensor in weights.norms],
        "others": [_tensor_json(tensor) for tensor in weights.others],
    }


def _tensor_json(tensor: Any) -> dict[str, Any]:
    value = dataclasses.asdict(tensor)
    value["class"] = value.pop("found").value
    if tensor.norm is not None:
        value |= value.pop("norm")
    else:
        del value["norm"]
    return plain(value)  # type: ignore[no-any-return]


def _outputs_json(report: DiffReport) -> dict[str, Any]:
    outputs = report.outputs
    assert outputs is not None
    value = dataclasses.asdict(dataclasses.replace(outputs, kl=()))  # type: ignore[arg-type]
    del value["kl"]
    value["percentiles"] = list(PERCENTILES)
    return plain(value)  # type: ignore[no-any-return]


def plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _tables(report: DiffReport) -> Iterator[Table]:
    if report.weights:
        yield tables.class_table(report.weights)
        yield tables.norm_table(report.weights, grouped=True)
        yield tables.other_table(report.weights)
    if report.outputs:
        yield tables.output_table(report.outputs)
        if not report.outputs.stats.identical:
            yield tables.percentile_table(report.outputs)
        yield tables.greedy_table(report.outputs)


def notes(report: DiffReport) -> Iterator[str]:
    """What to know about how the comparison was made."""
    yield from report.notes
    outputs = report.outputs
    if outputs is None:
        return
    size = f", {outputs.windows} windows of {outputs.context} tokens" if outputs.context else ""
    yield f"read: {outputs.text}{size}"
    yield f"A: {outputs.engines[0]}; B: {outputs.engines[1]}"
    if outputs.floor:
        yield f"noise floor: {outputs.floor_how}"
    if outputs.stats.vocabulary is None:
        yield (
            f"a server returns only the top {outputs.stats.top_k} tokens: divergences are lower "
            "bounds, and no logits were compared"
        )


def _histogram(report: DiffReport) -> Iterator[str]:
    assert report.weights is not None
    rows = tables.histogram_rows(report.weights)
    largest = max(count for _, count in rows)
    yield "norm weights by error of gamma, in float32 ulp (65,536 are one bf16 ulp)"
    for label, count in rows:
        if count:
            bar = "#" * max(1, round(_BAR * count / largest))
            yield f"  {label:>11}  {count:>9,}  {bar}"


def markdown_table(item: Table) -> Iterator[str]:
    """A table's lines."""
    yield "| " + " | ".join(item.header) + " |"
    yield "|" + " --- |" * len(item.header)
    for row in item.rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _code(line: str) -> str:
    which, _, rest = line.partition("  ")
    name, _, facts = rest.partition("  ")
    return f"{which}: `{name}` {facts}".rstrip()
