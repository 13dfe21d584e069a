"""The command's options, as a comparison and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_fold.diff.run import Options, check_writable, diff
from gemma_fold.diff.verdict import Limits, Report
from gemma_fold.progress import Progress


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
) -> Report:
    """Compare, and write the page where one is asked for; what cannot work is refused first.

    `options` are those of `Options`. Raises what `diff` raises.
    """
    if html is not None:
        from gemma_fold.diff.html import check_can_render, is_page, write_html

        check_writable(html, "--html", is_page)
        check_can_render()
    limits = Limits(max_kl, max_ulp)
    report = diff(a, b, Options(engines=engine, limits=limits, **options), progress)
    if html is not None:
        write_html(report, html)
    return report
