"""What the commands print for people, and the one progress bar."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from gemma_fold.checkpoint.progress import Progress
from gemma_fold.rules.model import shorten
from gemma_fold.text import human_size, printable, table

if TYPE_CHECKING:
    from gemma_fold.commands.convert import ConversionReport
    from gemma_fold.commands.inspect import Group, Inspection
    from gemma_fold.commands.push import PushReport
    from gemma_fold.commands.verify import VerifyReport
    from gemma_fold.rules import Fold
    from gemma_fold.rules.export import Export, ExportedFamily, ExportedNorm

_BAR_WIDTH = 20
_NORM_NAMES = {
    "rms_norm": "RMSNorm",
    "layer_norm": "LayerNorm",
    "grouped_rms_norm": "grouped RMSNorm",
}


def inspection(found: Inspection) -> str:
    """What `inspect` prints."""
    verdict = found.classification
    where = f"{found.source} at commit {found.commit}" if found.commit else found.source
    lines = [
        f"{where}: {verdict.model_type}",
        f"{found.tensors:,} tensors in {found.files} file{'s'[: found.files != 1]}, "
        f"{human_size(found.size)}",
        "",
    ]
    if found.norms:
        read = found.bf16_changes is not None
        header = ["TENSORS", "COUNT", "SHAPE", "DTYPE", "MEANING"]
        rows = [_group_row(group) for group in found.norms]
        if read:
            header.append("BF16 GAMMA WOULD CHANGE")
            rows = [[*row, _changes(g)] for row, g in zip(rows, found.norms, strict=True)]
        lines += [table(header, rows), ""]
    lines += _footnotes(found)
    lines.append(f"verdict: {_verdict(found)}")
    return "\n".join(lines)


def _verdict(found: Inspection) -> str:
    verdict = found.classification
    if found.incomplete:
        return f"incomplete: {len(verdict.missing)} norms that config.json calls for are missing"
    return f"{verdict.verdict.value}: {verdict.reason}"


def _group_row(group: Group) -> list[str]:
    shapes = ", ".join(str(list(shape)) for shape in list(group.shapes)[:3])
    if len(group.shapes) > 3:
        shapes += ", ..."
    return [group.pattern, str(group.count), shapes, "/".join(group.dtypes), _meaning(group)]


def _meaning(group: Group) -> str:
    if group.fold is not None:
        return f"zero-centred: {_gain(group.fold)}"
    if group.kind is None:
        return f"UNCLASSIFIED: {group.note}"
    return group.kind.value + (f": {group.note}" if group.note else "")


def _gain(fold: Fold) -> str:
    added = "" if fold.add_dtype == "float32" else f", added in {fold.add_dtype}"
    return f"{_NORM_NAMES[fold.norm]} gain {fold.offset:.6g} + w{added}"


def _changes(group: Group) -> str:
    if group.bf16_changes is None:
        return ""
    return f"{group.bf16_changes:,} of {group.elements:,}"


def _footnotes(found: Inspection) -> list[str]:
    lines = []
    if found.bf16_changes is not None:
        elements = sum(g.elements for g in found.norms if g.bf16_changes is not None)
        share = found.bf16_changes / elements if elements else 0.0
        lines.append(
            f"a bf16 gamma would change {found.bf16_changes:,} of {elements:,} norm weights "
            f"({share:.1%}); float32 changes none"
        )
    evidence = {g.evidence: g.family for g in found.norms if g.evidence is not None}
    lines += [f"rule {family}: {e.how}, {e.source}" for e, family in evidence.items()]
    lines += [f"note: {note}" for note in found.classification.notes]
    lines += [f"missing: {name}" for name in found.classification.missing[:10]]
    return [*lines, ""] if lines else []


def conversion(report: ConversionReport, *, verb: str) -> str:
    """What `convert` and `unfold` print when they are done."""
    return (
        f"{verb} {report.tensors} norms ({report.elements:,} weights) of {report.model_type} "
        f"into {report.out}: {report.files} files, {human_size(report.size)}"
    )


def pushed(report: PushReport) -> str:
    """What `push` prints: what was made, or the card of what would be."""
    what = f"{report.files} files, {human_size(report.size)}"
    if report.url is None:
        return f"{report.card}\nwould push {what} to {report.repo_id}, with this card"
    return f"pushed {what}: {report.url}"


def verification(report: VerifyReport) -> str:
    """What `verify` prints."""
    lines = [f"note: {note}" for note in report.notes]
    lines += [f"FAILED {problem}" for problem in report.problems[:20]]
    if len(report.problems) > 20:
        lines.append(f"... and {len(report.problems) - 20} more")
    if report.ok:
        rest = ""
        if report.bytes_compared:
            rest = f"; {human_size(report.bytes_compared)} compared equal with the source"
        elif report.bytes_proven:
            rest = f"; {human_size(report.bytes_proven)} have the digests taken at conversion"
        lines.append(f"ok: format, locks, manifest and {report.tensors} gammas{rest}")
    return "\n".join(lines)


def rules(found: Export, model_type: str | None) -> str:
    """What `rules` prints: of the whole table a line for each family, of one all it says."""
    if model_type is not None:
        shown = [_family(family, model_type) for family in found.families]
        if found.wrappers:
            shown.append("a model inside is decided by its own model_type, in config.json")
        return "\n\n".join(shown)
    rows = [_family_row(family) for family in found.families if family.kind != "plain"]
    plain = {name for f in found.families if f.kind == "plain" for name in f.model_types}
    return (
        f"{table(['MODEL TYPES', 'NORMS', 'ZERO-CENTRED IF', 'EVIDENCE'], rows)}\n\n"
        f"{len(plain)} more model types store plain gamma in every norm of their own; "
        "gemma-fold rules MODEL_TYPE says which code was read or run"
    )


def _family_row(family: ExportedFamily) -> list[str]:
    return [
        shorten((*family.model_types, *family.architectures)),
        family.kind,
        family.condition,
        _evidence(family),
    ]


def _family(family: ExportedFamily, asked: str) -> str:
    said = "plain: no norm of its own adds to its weight" if family.kind == "plain" else family.kind
    lines = [f"{asked}: {family.reason or said}", f"rule: {_evidence(family)}"]
    if family.condition:
        lines.append(f"zero-centred if {family.condition}")
    if family.roots:
        lines.append("below " + ", ".join(root or "the top" for root in family.roots))
    if family.norms:
        rows = [[norm.pattern, _rule(norm, family)] for norm in family.norms]
        lines += ["", table(["TENSORS", "MEANING"], rows)]
    for part in family.parts:
        whose = part.model_type or f"its own model_type, or {part.default}"
        lines.append(f"{part.key}: a model inside, with the rules of {whose}")
    return "\n".join(lines)


def _evidence(family: ExportedFamily) -> str:
    return f"{family.evidence.how}, {family.evidence.source}"


def _rule(norm: ExportedNorm, family: ExportedFamily) -> str:
    meaning = _gain(norm.fold) if norm.fold else norm.kind
    own = norm.condition and norm.condition != family.condition
    condition = f" if {norm.condition}" if own else ""
    return meaning + condition + (f": {norm.note}" if norm.note else "")


class ProgressBar(Progress):
    """On stderr: a bar with what is done and the current file, or that something goes on."""

    def __init__(self, label: str, *, hidden: bool = False) -> None:
        self._label = label
        self._hidden = hidden
        self._shown: Callable[[int], str] = human_size
        self._total = ""
        self._files = 0
        self._file = ""
        self._bar: Any = None
        self._waiting: Waiting | None = None

    def start(self, total_bytes: int, files: int) -> None:
        """Draw the bar, empty, in bytes."""
        self._draw(total_bytes, files, human_size)

    def start_steps(self, steps: int, files: int) -> None:
        """Draw the bar, empty, in steps."""
        self._draw(steps, files, str)

    def waiting(self, what: str) -> None:
        """Show that `what` goes on, and for how long, until the next start."""
        self.finish()
        if not self._hidden:
            self._waiting = Waiting(what)

    def file(self, name: str, number: int) -> None:
        """Show the file that begins."""
        self._file = f"{number}/{self._files} {name}"
        self.advance(0)

    def advance(self, n_bytes: int) -> None:
        """Move on by `n_bytes`, or so many steps."""
        done = self._shown(self._bar.pos + n_bytes)
        self._bar.update(n_bytes, f"{done} of {self._total}  {self._file}")

    def finish(self) -> None:
        """End the line of whatever is shown; a bar stays."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None

    def _draw(self, total: int, files: int, shown: Callable[[int], str]) -> None:
        self.finish()
        self._shown, self._total, self._files = shown, shown(total), files
        # What follows the bar is cut to the terminal, as a line that wraps is not drawn over.
        room = shutil.get_terminal_size().columns - len(self._label) - _BAR_WIDTH - 22
        self._bar = click.progressbar(
            length=total,
            label=self._label,
            file=sys.stderr,
            width=_BAR_WIDTH,
            item_show_func=lambda item: (item or "")[: max(0, room)],
            hidden=self._hidden,
        ).__enter__()


class Waiting:
    """A line on stderr with what goes on and for how long, from the second on that it takes."""

    def __init__(self, what: str) -> None:
        self._what = printable(what, sys.stderr.encoding, one_line=True)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Remove the line."""
        self._end.set()
        self._thread.join()

    def _show(self) -> None:
        seconds = 0
        while not self._end.wait(1):
            seconds += 1
            columns = shutil.get_terminal_size().columns
            click.echo(f"\r{self._what} ({seconds} s)"[:columns], err=True, nl=False)
        if seconds:
            click.echo("\r\033[K", err=True, nl=False)
