"""What `check` prints for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gemma_fold.commands.check import CheckReport
from gemma_fold.compare.offsets.expectation import FORMAT_NAMES
from gemma_fold.compare.offsets.finding import Finding, NormCheck
from gemma_fold.compare.report.tables import Table
from gemma_fold.compare.report.writers import markdown_table
from gemma_fold.rules.model import shorten
from gemma_fold.text import human_size
from gemma_fold.text import table as padded

_MOST_SHOWN = 10


def text(report: CheckReport, *, every: bool = False) -> str:
    """The report; `every` lists each norm rather than those that are wrong."""
    lines = [f"{word} {name}: {what}".lstrip() for word, name, what in sides(report)]
    lines += [report.expectation, ""]
    if report.norms:
        found = finding_table(report)
        lines += [padded(found.header, found.rows), ""]
        lines += _listed(report.norms, every)
    evidence = evidence_lines(report)
    lines += [*evidence, ""] if evidence else []
    lines += [*remarks(report), report.verdict.line]
    return "\n".join(lines)


def markdown(report: CheckReport) -> str:
    """The same for a model card or a pull request."""
    lines = [f"**{report.verdict.line}**", ""]
    lines += [f"- {word or 'file'} `{name}`: {what}" for word, name, what in sides(report)]
    lines += [f"- {line}" for line in (report.expectation, *remarks(report))]
    lines += evidence_lines(report)
    if report.norms:
        lines += ["", *markdown_table(finding_table(report)), ""]
        lines += [f"- {line}" for line in _listed(report.norms, every=False) if line]
    return "\n".join(lines)


def sides(report: CheckReport) -> Iterator[tuple[str, str, str]]:
    """What was compared with what: a word, the name, and what is known of it."""
    for word, file in (("", report.file), ("against", report.against)):
        if file is not None:
            what = [FORMAT_NAMES[file.format], file.model_type]
            if file.tool and file.tool.lower() not in FORMAT_NAMES[file.format].lower():
                what.insert(1, file.tool)
            at = f" at commit {file.commit}" if file.commit else ""
            read = f"{human_size(file.read)} of {human_size(file.size)} read"
            yield word, file.name + at, f"{', '.join(part for part in what if part)}; {read}"


def finding_table(report: CheckReport) -> Table:
    """How many norms there are of each finding."""
    rows = []
    for finding in Finding:
        ours = [n for n in report.norms if n.finding is finding]
        if ours:
            changed, elements = sum(n.changed for n in ours), sum(n.elements for n in ours)
            error = f"{max(n.max_ulp for n in ours):,} ulp" if changed else ""
            rows.append([finding.value, f"{len(ours):,}", f"{changed:,} of {elements:,}", error])
    return Table("Norms", ("FINDING", "NORMS", "WEIGHTS OFF", "LARGEST ERROR"), rows)


def norm_table(norms: Sequence[NormCheck]) -> Table:
    """Every norm of a list."""
    header = ("NORM", "FINDING", "DTYPE", "WEIGHTS OFF", "OF", "MAX ULP", "REMARK")
    rows = [
        (
            n.name,
            n.finding.value,
            n.dtype,
            f"{n.changed:,}",
            f"{n.elements:,}",
            f"{n.max_ulp:,}",
            remark(n),
        )
        for n in norms
    ]
    return Table("Every norm", header, rows)


def remarks(report: CheckReport) -> list[str]:
    """What was left out, and what else to know."""
    out = report.left_out
    lines = [f"not in the file, and not checked: {shorten(out)}"] if out else []
    return lines + [f"note: {note}" for note in report.notes]


def _listed(norms: Sequence[NormCheck], every: bool) -> list[str]:
    chosen = [n for n in norms if every or not n.right]
    shown = chosen if every else chosen[:_MOST_SHOWN]
    lines = [
        f"{n.name}: {n.finding.value}" + (f" ({remark(n)})" if remark(n) else "") for n in shown
    ]
    if len(chosen) > len(shown):
        lines.append(f"... and {len(chosen) - len(shown)} more; --all lists them")
    return [*lines, ""] if lines else []


def remark(norm: NormCheck) -> str:
    """What else is known of a norm, in words."""
    parts = [norm.remark] if norm.remark else []
    if norm.offset is not None and norm.residual is not None and norm.added is None:
        parts.append(f"w plus {norm.offset:.4g}, to within {norm.residual:.3g}")
    return "; ".join(parts)


def evidence_lines(report: CheckReport) -> list[str]:
    """What the file shows alone; nothing where there is an original."""
    found = report.evidence
    if found is None:
        return []
    lines = [f"{found.norms:,} zero-centred norms, {found.elements:,} weights, no original given"]
    return lines + [f"- {reason}" for reason in found.reasons if reason]
