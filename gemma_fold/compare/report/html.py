"""A report as one HTML file that opens offline: styles and charts are inside it."""

from __future__ import annotations

import importlib.util
from importlib.resources import files
from pathlib import Path
from typing import Any

from gemma_fold.compare.report import tables
from gemma_fold.compare.report.verdict import DiffReport
from gemma_fold.compare.report.writers import notes
from gemma_fold.compare.weights.norms import TensorClass
from gemma_fold.errors import HostError


def check_can_render() -> None:
    """HostError unless jinja2 and matplotlib are installed."""
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise HostError(
                f"--html needs {package}; install it with: pip install 'gemma-fold[report]'"
            )


def is_page(path: Path) -> bool:
    """Whether a file may be an earlier page."""
    with open(path, "rb") as file:
        return file.read(15).lower() in (b"", b"<!doctype html>")


def write_html(report: DiffReport, path: Path) -> None:
    """Write the page.

    Raises:
        HostError: a package is missing.
        OSError: the file cannot be written.
    """
    path.write_text(html(report), "utf-8")


def html(report: DiffReport) -> str:
    """The page's text."""
    check_can_render()
    import jinja2

    from gemma_fold.compare.report import charts

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(
        files("gemma_fold.compare.report").joinpath("report.html").read_text("utf-8")
    )
    weights, outputs = report.weights, report.outputs
    return template.render(
        report=report,
        facts=_facts(report),
        structure=list(tables.structure_lines(report)),
        notes=list(notes(report)),
        classes=tables.class_table(weights) if weights else None,
        norms=tables.norm_table(weights, grouped=False) if weights and weights.norms else None,
        others=tables.other_table(weights) if weights and weights.others else None,
        layer_chart=charts.layer_chart(weights) if weights else None,
        ulp_chart=charts.ulp_chart(weights) if weights else None,
        gamma_chart=charts.gamma_chart(weights) if weights else None,
        statistics=tables.output_table(outputs) if outputs else None,
        percentiles=tables.percentile_table(outputs)
        if outputs and not outputs.stats.identical
        else None,
        kl_chart=charts.kl_chart(outputs) if outputs else None,
        greedy=outputs.greedy if outputs else (),
    )


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
