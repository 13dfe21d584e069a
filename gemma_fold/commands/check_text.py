"""What `check` prints for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gemma_fold.commands.check import CheckedFile, CheckReport
from gemma_fold.compare.offsets.evidence import Evidence
from gemma_fold.compare.offsets.expectation import FORMAT_NAMES
from gemma_fold.compare.offsets.finding import Finding, NormCheck
from gemma_fold.rules.model import shorten
from gemma_fold.text import human_size, table

_MOST_SHOWN = 10


def text(report: CheckReport, *, every: bool = False) -> str:
    """The report; `every` lists each norm rather than those that are wrong."""
    lines = [_side(report.file)]
    if report.against is not None:
        lines.append("against " + _side(report.against))
    lines += [report.expectation, ""]
    if report.norms:
        lines += [
            table(["FINDING", "NORMS", "WEIGHTS OFF", "LARGEST ERROR"], _rows(report.norms)),
            "",
        ]
        lines += _listed(report.norms, every)
    if report.evidence is not None:
        lines += [*_evidence(report.evidence), ""]
    if report.left_out:
        lines.append(f"not in the file, and not checked: {shorten(report.left_out)}")
    lines += [f"note: {note}" for note in report.notes]
    lines.append(report.verdict.line)
    return "\n".join(lines)


def _side(file: CheckedFile) -> str:
    what = [FORMAT_NAMES[file.format], file.model_type]
    if file.tool and file.tool.lower() not in FORMAT_NAMES[file.format].lower():
        what.insert(1, file.tool)
    at = f" at commit {file.commit}" if file.commit else ""
    read = f"{human_size(file.read)} of {human_size(file.size)} read"
    return f"{file.name}{at}: {', '.join(part for part in what if part)}; {read}"


def _rows(norms: Sequence[NormCheck]) -> Iterator[list[str]]:
    for finding in Finding:
        ours = [n for n in norms if n.finding is finding]
        if not ours:
            continue
        changed, elements = sum(n.changed for n in ours), sum(n.elements for n in ours)
        ulp = max(n.max_ulp for n in ours)
        error = f"{ulp:,} ulp" if changed else ""
        yield [finding.value, f"{len(ours):,}", f"{changed:,} of {elements:,}", error]


def _listed(norms: Sequence[NormCheck], every: bool) -> list[str]:
    chosen = [n for n in norms if every or not n.right]
    shown = chosen if every else chosen[:_MOST_SHOWN]
    lines = [f"{n.name}: {n.finding.value}{_remark(n)}" for n in shown]
    if len(chosen) > len(shown):
        lines.append(f"... and {len(chosen) - len(shown)} more; --all lists them")
    return [*lines, ""] if lines else []


def _remark(norm: NormCheck) -> str:
    parts = [norm.remark] if norm.remark else []
    if norm.offset is not None and norm.residual is not None and norm.added is None:
        parts.append(f"w plus {norm.offset:.4g}, to within {norm.residual:.3g}")
    return f" ({'; '.join(parts)})" if parts else ""


def _evidence(found: Evidence) -> list[str]:
    lines = [f"{found.norms:,} zero-centred norms, {found.elements:,} weights, no original given"]
    return lines + [f"- {reason}" for reason in found.reasons if reason]
