"""The rows that text, Markdown and HTML share: numbers as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gemma_fold.compare.outputs.results import PERCENTILES, Distribution, Outputs
from gemma_fold.compare.report.verdict import DiffReport, SideInfo
from gemma_fold.compare.weights.norms import NormStats, Spread, TensorClass
from gemma_fold.compare.weights.tensors import TensorDiff, Weights
from gemma_fold.rules.model import shorten
from gemma_fold.text import cut

_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table of strings; the first column names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(value: float | None, digits: int = 4) -> str:
    """A number to `digits` significant places; exact zero is `0`."""
    if value is None:
        return ""
    if math.isnan(value):
        return "nan"
    return "0" if value == 0 else f"{value:.{digits}g}"


def side(which: str, info: SideInfo) -> str:
    """`A  name  (gemma3_text, folded, commit ...)`."""
    facts = []
    if info.model_type:
        facts.append(info.model_type)
    if info.folded is not None:
        facts.append("folded" if info.folded else "not marked as folded")
    if info.commit:
        facts.append(f"commit {info.commit[:12]}")
    return f"{which}  {info.name}" + (f"  ({', '.join(facts)})" if facts else "")


def structure_lines(report: DiffReport) -> Iterator[str]:
    """The differences in headers and configs, a line each."""
    found = report.structure
    if found is None:
        return
    yield f"{found.tensors} tensors on both sides; {found.folded_forms} differ in form by the fold"
    for what, names in (("only in A", found.only_in_a), ("only in B", found.only_in_b)):
        if names:
            yield f"{len(names)} {what}: {shorten(names)}"
    for change in found.forms[:5]:
        yield f"{change.name}: {change.a} and {change.b}"
    if found.moved:
        yield f"{len(found.moved)} tensors lie in another weight file, which changes nothing"
    for change in (*found.config, *found.config_notes)[:10]:
        yield f"config {change.name}: {change.a} and {change.b}"
    for change in found.files[:5]:
        yield f"file {change.name}: {change.a} and {change.b}"
    if report.weights and report.weights.files:
        yield f"other files whose content differs: {shorten(report.weights.files)}"


def class_table(weights: Weights) -> Table:
    """How many tensors there are of each class."""
    rows = []
    for found in TensorClass:
        if count := weights.counts.get(found):
            norms = sum(t.found is found for t in weights.norms)
            rows.append([found.value, str(norms), str(count - norms)])
    return Table("Weights", ("CLASS", "NORMS", "OTHER TENSORS"), rows)


def norm_table(weights: Weights, *, grouped: bool) -> Table:
    """The per-norm table; `grouped` joins layers, for terminals."""
    header = (
        "NORM", "CLASS", "w MIN", "MEAN", "MAX", "GAMMA A MIN", "MEAN", "MAX",
        "CHANGED", "OF", "MAX ABS", "MAX REL", "MAX ULP",
    )  # fmt: skip
    rows = []
    for name, found, stats in _groups(weights.norms) if grouped else _singles(weights.norms):
        rows.append(
            [
                name,
                found,
                *_spread(stats.w),
                *_spread(stats.gamma_a),
                f"{stats.changed:,}",
                f"{stats.elements:,}",
                number(stats.max_abs),
                number(stats.max_rel),
                f"{stats.max_ulp:,}",
            ]
        )
    return Table("Norms", header, rows)


def other_table(weights: Weights) -> Table:
    """Tensors that are not norms and not identical."""
    rows = [
        [t.name, t.found.value, f"{t.changed:,}", number(t.max_abs), t.remark]
        for t in weights.others
    ]
    return Table("Other tensors", ("TENSOR", "CLASS", "CHANGED", "MAX ABS", "REMARK"), rows)


def histogram_rows(weights: Weights) -> list[tuple[str, int]]:
    """Norm weights by ulp distance, from zero to the last bucket in use."""
    counts = weights.histogram
    last = max((i for i, n in enumerate(counts) if n), default=0)
    return [(_bucket(i), counts[i]) for i in range(last + 1)]


def output_table(outputs: Outputs) -> Table:
    """The statistics of B against A, and of A against itself beside them."""
    columns = [outputs.stats, *([outputs.floor] if outputs.floor else [])]
    exact = outputs.stats.vocabulary is not None
    what = "logit" if exact else "log-probability"
    bound = "" if exact else " (lower bound)"
    lines = [
        ("positions", [f"{s.positions:,}" for s in columns]),
        (f"{what}s that differ", [_differing(s.differing) for s in columns]),
        ("positions that differ", [f"{s.positions_differing:,}" for s in columns]),
        (f"largest {what} difference", [number(s.max_abs) for s in columns]),
        (f"mean KL(A||B), nats{bound}", [number(s.kl_ab.mean) for s in columns]),
        (f"mean KL(B||A), nats{bound}", [number(s.kl_ba.mean) for s in columns]),
        ("same top token", [f"{s.same_top:.3%} ± {s.same_top_sigma:.3%}" for s in columns]),
        (f"top {outputs.stats.top_k} overlap", [f"{s.overlap:.3%}" for s in columns]),
        ("perplexity A", [number(s.perplexity_a, 6) for s in columns]),
        ("perplexity B", [number(s.perplexity_b, 6) for s in columns]),
        (
            "perplexity ratio B / A",
            [f"{s.ratio:.6f} ± {s.ratio * s.ln_ratio_sigma:.6f}" for s in columns],
        ),
        ("change of p(next token), mean", [number(s.delta_p_mean, 3) for s in columns]),
        ("change of p(next token), rms", [number(s.delta_p_rms, 3) for s in columns]),
    ]
    if any(s.non_finite for s in columns):
        lines.append(("positions not finite", [str(s.non_finite) for s in columns]))
    if any(s.listed < s.positions for s in columns):
        missing = [str(s.positions - s.listed) for s in columns]
        lines.append(("positions without top tokens", missing))
    if not exact:
        lines = [line for line in lines if line[1][0]]
    header = ["", "B AGAINST A", *(["NOISE FLOOR"] if outputs.floor else [])]
    return Table("Outputs", header, [[name, *cells] for name, cells in lines])


def percentile_table(outputs: Outputs) -> Table:
    """Percentiles of both divergences."""
    columns = [("KL(A||B)", outputs.stats.kl_ab), ("KL(B||A)", outputs.stats.kl_ba)]
    if outputs.floor:
        columns.append(("NOISE FLOOR KL(A||A)", outputs.floor.kl_ab))
    names = ["maximum", *("median" if p == 50 else f"{p:g} %" for p in PERCENTILES), "minimum"]
    cells = [_steps(kl) for _, kl in columns]
    rows = [[name, *values] for name, *values in zip(names, *cells, strict=True)]
    return Table("KL by percentile", ("POSITIONS", *(n for n, _ in columns)), rows)


def greedy_table(outputs: Outputs) -> Table:
    """Where greedy continuations part."""
    rows = []
    for item in outputs.greedy:
        where = "same" if item.diverges_at is None else f"diverges at token {item.diverges_at + 1}"
        rows.append([cut(" ".join(item.prompt.split()), 60), str(item.tokens), where])
    return Table("Greedy continuations", ("PROMPT", "TOKENS", "RESULT"), rows)


def _steps(kl: Distribution) -> list[str]:
    return [number(value, 3) for value in (kl.max, *kl.percentiles, kl.min)]


def _differing(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _bucket(index: int) -> str:
    if index < 2:
        return str(index)
    low = 1 << (index - 1)
    return f"{_power(low)}-{_power(2 * low - 1)}"


def _power(value: int) -> str:
    if value < 1 << 10:
        return str(value)
    return f"{value / (1 << 10):.0f}k" if value < 1 << 20 else f"{value / (1 << 20):.0f}M"


def _spread(values: Spread) -> list[str]:
    return [number(values.min), number(values.mean), number(values.max)]


def _singles(norms: Sequence[TensorDiff]) -> Iterator[tuple[str, str, NormStats]]:
    for tensor in norms:
        assert tensor.norm is not None
        yield tensor.name, tensor.found.value, tensor.norm


def _groups(norms: Sequence[TensorDiff]) -> Iterator[tuple[str, str, NormStats]]:
    """Norms whose names differ only in the layer's number, joined if they are of one class."""
    groups: dict[tuple[str, str], list[NormStats]] = {}
    for name, found, stats in _singles(norms):
        groups.setdefault((_LAYER.sub("{i}", name), found), []).append(stats)
    for (name, found), members in groups.items():
        yield (f"{name} x{len(members)}" if len(members) > 1 else name), found, join_stats(members)


def join_stats(members: Sequence[NormStats]) -> NormStats:
    """The numbers of several norms as one."""
    elements = sum(m.elements for m in members)

    def joined(key: str) -> Spread:
        spreads: list[tuple[Spread, int]] = [(getattr(m, key), m.elements) for m in members]
        return Spread(
            min(s.min for s, _ in spreads),
            sum(s.mean * n for s, n in spreads) / max(1, elements),
            max(s.max for s, _ in spreads),
        )

    return NormStats(
        elements=elements,
        changed=sum(m.changed for m in members),
        w=joined("w"),
        gamma_a=joined("gamma_a"),
        gamma_b=joined("gamma_b"),
        max_abs=max(m.max_abs for m in members),
        max_rel=max(m.max_rel for m in members),
        max_ulp=max(m.max_ulp for m in members),
        histogram=tuple(sum(c) for c in zip(*(m.histogram for m in members), strict=True)),
    )
