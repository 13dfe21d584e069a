"""What `check --html` writes: a page in the look of diff's."""

from __future__ import annotations

from typing import Any

from gemma_fold.commands import check_text
from gemma_fold.commands.check import CheckReport
from gemma_fold.compare.report.html import check_can_render, page
from gemma_fold.compare.run import describe_environment


def html(report: CheckReport) -> str:
    """The page's text. Raises HostError where a package is missing."""
    check_can_render()
    from gemma_fold.compare.report.charts import layer_chart

    word, _, rest = report.verdict.line.partition(": ")
    wrong = [norm for norm in report.norms if not norm.right]
    return page(
        "check.html",
        report=report,
        environment=describe_environment(),
        word=word if rest else "cannot tell",
        rest=rest or report.verdict.line,
        sides=[(word or "file", *facts) for word, *facts in check_text.sides(report)],
        expectation=report.expectation[:1].upper() + report.expectation[1:],
        facts=_facts(report),
        findings=check_text.finding_table(report),
        wrong=check_text.norm_table(wrong),
        norms=check_text.norm_table(report.norms),
        layer_chart=layer_chart([(n.name, n.changed, n.elements) for n in report.norms]),
        remarks=[
            *(line.removeprefix("- ") for line in check_text.evidence_lines(report)),
            *check_text.remarks(report),
        ],
    )


def _facts(report: CheckReport) -> list[dict[str, Any]]:
    """The figures at the top: value, what it is, and whether it is good."""
    rows = check_text.finding_table(report).rows
    right = {norm.finding.value for norm in report.norms if norm.right}
    facts = [
        {"value": row[1], "label": f"norms: {row[0]}", "good": row[0] in right} for row in rows
    ]
    if report.evidence is not None:
        facts = [
            {"value": f"{report.evidence.norms:,}", "label": "zero-centred norms", "good": None},
            {"value": f"{report.evidence.elements:,}", "label": "weights in them", "good": None},
            {"value": f"{report.evidence.mean:.3g}", "label": "mean", "good": None},
        ]
    return facts
