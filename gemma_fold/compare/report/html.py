"""A report as one HTML file that opens offline: styles and charts are inside it."""

from __future__ import annotations

import importlib.util
from importlib.resources import files
from pathlib import Path
from typing import Any

from gemma_fold.compare.report import tables
from gemma_fold.compare.report.verdict import DiffReport
from gemma_fold.compare.report.writers import notes
from gemma_fold.compare.run import check_writable
from gemma_fold.compare.weights.norms import TensorClass
from gemma_fold.compare.weights.tensors import Weights
from gemma_fold.errors import HostError
from gemma_fold.text import printable


def check_can_render() -> None:
    """HostError unless jinja2 and matplotlib are installed."""
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise HostError(
                f"--html needs {package}; install it with: pip install 'gemma-fold[report]'"
            )


def check_page(path: Path) -> None:
    """UsageError or HostError unless a page can be made and written to `path`."""
    check_writable(path, "--html", _is_page)
    check_can_render()


def _is_page(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(15).lower() in (b"", b"<!doctype html>")


def html(report: DiffReport) -> str:
    """The page's text."""
    check_can_render()
    from gemma_fold.compare.report import charts

    weights, outputs = report.weights, report.outputs
    return page(
        "diff.html",
        report=report,
        environment=report.environment,
        facts=_facts(report),
        structure=list(tables.structure_lines(report)),
        notes=list(notes(report)),
        classes=tables.class_table(weights) if weights else None,
        norms=tables.norm_table(weights, grouped=False) if weights and weights.norms else None,
        others=tables.other_table(weights) if weights and weights.others else None,
        layer_chart=charts.layer_chart(_changed(weights)) if weights else None,
        ulp_chart=charts.ulp_chart(weights) if weights else None,
        gamma_chart=charts.gamma_chart(weights) if weights else None,
        statistics=tables.output_table(outputs) if outputs else None,
        percentiles=tables.percentile_table(outputs)
        if outputs and not outputs.stats.identical
        else None,
        kl_chart=charts.kl_chart(outputs) if outputs else None,
        greedy=outputs.greedy if outputs else (),
    )


def page(template: str, **values: Any) -> str:
    """A template of this folder, filled; text is escaped, and so are control characters."""
    import jinja2

    folder = files("gemma_fold.compare.report")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
    )
    return printable(environment.get_template(template).render(values))


def _changed(weights: Weights) -> list[tuple[str, int, int]]:
    return [(t.name, t.norm.changed, t.norm.elements) for t in weights.norms if t.norm]


def _facts(report: DiffReport) -> list[dict[str, Any]]:
    """The figures at the top of the page: value, what it is, and whether it is good."""
    facts: list[dict[str, Any]] = []

    def add(value: str, label: str, good: bool | None = None) -> None:
        facts.append({"value": value, "label": label, "good": good})

    weights, outputs = report.weights, report.outputs
    if weights:
        for found, count in sorted(weights.counts.items(), key=lambda item: item[0].same):
            what = "tensors identical" if found is TensorClass.IDENTICAL else found.value
            add(f"{count:,}", what, found.same)
        if weights.changed:
            share = weights.changed / weights.elements
            add(f"{share:.1%}", f"of {weights.elements:,} norm weights differ", False)
    if outputs:
        stats = outputs.stats
        if stats.differing is not None:
            total = stats.positions * (stats.vocabulary or 0)
            part = f"{stats.differing / total:.1%}" if stats.differing >= 0.01 * total else None
            add(part or f"{stats.differing:,}", f"of {total:,} logits differ", stats.identical)
        add(f"{stats.same_top:.2%}", f"same top token, {stats.positions:,} positions")
        add(tables.number(stats.mean_kl, 3), "mean KL, nats")
        if outputs.floor:
            add(tables.number(outputs.floor.mean_kl, 3), "mean KL of A's own noise")
    return facts
