"""The command's options, as a comparison and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_fold.checkpoint.progress import Progress
from gemma_fold.compare.report.verdict import DiffLimits, DiffReport
from gemma_fold.compare.run import DiffOptions, check_writable, diff


def run(
    a: str,
    b: str,
    *,
    html: Path | None,
    progress: Progress,
    engine: tuple[str, ...],
    max_kl: float | None,
    max_ulp: int,
    **options: Any,
) -> DiffReport:
    """Compare, and write the page if one is asked for; what cannot work is refused first.

    `options` are those of `DiffOptions`. Raises what `diff` raises.
    """
    if html is not None:
        from gemma_fold.compare.report.html import check_can_render, is_page, write_html

        check_writable(html, "--html", is_page)
        check_can_render()
    limits = DiffLimits(max_kl, max_ulp)
    report = diff(a, b, DiffOptions(engines=engine, limits=limits, **options), progress)
    if html is not None:
        write_html(report, html)
    return report
