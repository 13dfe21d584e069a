"""The command's options, as a comparison of two checkpoints or of the norms of two files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gemma_fold.checkpoint.progress import Progress
from gemma_fold.commands import check_text
from gemma_fold.commands.check import beside
from gemma_fold.commands.check import to_json as check_json
from gemma_fold.compare.files.opening import have_only_norms_in_common, is_gguf, open_file
from gemma_fold.compare.outputs.server import is_url
from gemma_fold.compare.report import writers
from gemma_fold.compare.report.verdict import DiffLimits
from gemma_fold.compare.run import DiffOptions, diff
from gemma_fold.errors import UsageError


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome: its exit code, and what makes each form of its report."""

    exit_code: int
    json: Callable[[], dict[str, Any]]
    text: Callable[[], str]
    markdown: Callable[[], str]


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
) -> Found:
    """Compare, and write the page where one is asked for; what cannot work is refused first.

    Files of two tools have nothing in common but their norms, which are compared as `check` does.

    `options` are those of `DiffOptions`. Raises what `diff` and `check` raise.
    """
    if html is not None:
        from gemma_fold.compare.report.html import check_page

        check_page(html)
    chosen = DiffOptions(engines=engine, limits=DiffLimits(max_kl, max_ulp), **options)
    return _norms(a, b, chosen, html) or _checkpoints(a, b, chosen, html, progress)


def _checkpoints(
    a: str, b: str, options: DiffOptions, html: Path | None, progress: Progress
) -> Found:
    report = diff(a, b, options, progress)
    if html is not None:
        from gemma_fold.compare.report.html import html as page

        html.write_text(page(report), "utf-8")
    return Found(
        report.verdict.exit_code,
        partial(writers.to_json, report),
        partial(writers.text, report),
        partial(writers.markdown, report),
    )


def _norms(a: str, b: str, options: DiffOptions, html: Path | None) -> Found | None:
    """The comparison of norms, where that is what there is to compare."""
    if options.structure_only or options.asks_for_outputs or is_url(a) or is_url(b):
        for side in (a, b):
            if is_gguf(side):
                raise UsageError(
                    f"{side} is a GGUF file, of which only the norms are compared, with another "
                    "file; leave out what compares outputs or structure"
                )
        return None
    reference, file = open_file(a), open_file(b)
    if not have_only_norms_in_common(reference, file):
        return None
    if options.limits != DiffLimits():
        raise UsageError(
            f"{a} and {b} are files of two tools, whose norms are compared exactly; "
            "leave out --max-kl and --max-ulp"
        )
    report = beside(file, reference)
    if html is not None:
        from gemma_fold.commands.check_html import html as page

        html.write_text(page(report), "utf-8")
    return Found(
        report.verdict.exit_code,
        partial(check_json, report),
        partial(check_text.text, report),
        partial(check_text.markdown, report),
    )
