"""The charts of the HTML report: SVG text in the colours of the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from gemma_fold.compare.outputs.results import Floats, Outputs
from gemma_fold.compare.report.tables import histogram_rows
from gemma_fold.compare.weights.tensors import Weights

Value = TypeVar("Value")

#: Colours that stand for the page's own until the SVG text is finished.
_INK, _MUTED, _ACCENT, _SECOND, _GRID = "#0a0b0c", "#0a0b0d", "#0a0b0e", "#0a0b0f", "#0a0b10"
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _ACCENT: "var(--accent)",
    _SECOND: "var(--second)",
    _GRID: "var(--grid)",
}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
}
_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")


def ulp_chart(weights: Weights) -> str | None:
    """Norm weights by the error of their gamma; None if there is no error."""
    rows = histogram_rows(weights)
    if not any(count for _, count in rows[1:]):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        labels, counts = zip(*rows, strict=True)
        colours = [_SECOND, *[_ACCENT] * (len(rows) - 1)]
        axes.bar(range(len(rows)), counts, width=0.82, color=colours, linewidth=0)
        axes.set_yscale("log")
        axes.set_ylim(0.7, max(counts) * 2)
        axes.yaxis.grid(True)
        axes.set_xticks(range(len(rows)), labels, rotation=45, ha="right", fontsize=8.5)
        axes.set_xlabel("distance in float32 ulp (65,536 make one bf16 ulp)")
        axes.set_ylabel("norm weights")

    return _svg("ulp", (9, 3.1), draw)


def kl_chart(outputs: Outputs) -> str | None:
    """KL by position, B against A and A against itself; None if all of it is zero."""
    if outputs.stats.identical:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        series = [("B against A", outputs.kl[0], _ACCENT)]
        if outputs.kl[1] is not None:
            series.append(("noise floor: A against A", outputs.kl[1], _SECOND))
        edges = np.arange(*_decades([values for _, values, _ in series]), 0.25)
        for name, values, colour in series:
            _kl_steps(axes, name, values, edges, colour)
        axes.set_xlabel("KL at a position, nats")
        axes.set_ylabel("positions, %")
        axes.yaxis.grid(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(lambda power, _: f"1e{power:.0f}")
        axes.legend(loc="upper left")

    return _svg("kl", (9, 2.9), draw)


def _decades(series: Sequence[Floats]) -> tuple[float, float]:
    known = np.concatenate([values[np.isfinite(values) & (values > 0)] for values in series])
    if not known.size:
        return -10.0, 0.25
    low, high = np.log10(np.percentile(known, (0.5, 100)))
    return float(np.floor(low)), float(np.ceil(high) + 0.25)


def _kl_steps(axes: Any, name: str, values: Floats, edges: Floats, colour: str) -> None:
    zero = np.count_nonzero(values == 0)
    positive = values[values > 0]
    counts, _ = np.histogram(np.log10(positive), edges)
    label = name + (f" (exactly 0 at {zero / values.size:.0%} of positions)" if zero else "")
    axes.stairs(100 * counts / values.size, edges, color=colour, fill=True, alpha=0.25, lw=0)
    axes.stairs(100 * counts / values.size, edges, color=colour, lw=1.6, label=label)


def gamma_chart(weights: Weights) -> str | None:
    """Extent and mean of gamma by layer, one panel for each kind of norm."""
    kinds = _by_kind((t.name, t.norm.gamma_a) for t in weights.norms if t.norm)
    if not kinds:
        return None

    def draw(figure: Figure) -> None:
        columns = min(3, len(kinds))
        panels = figure.subplots(-(-len(kinds) // columns), columns, squeeze=False).flat
        for axes, (kind, layers) in zip(panels, kinds.items(), strict=False):
            numbers = [number for number, _ in layers]
            spreads = [spread for _, spread in layers]
            low, mean, high = ([getattr(s, k) for s in spreads] for k in ("min", "mean", "max"))
            axes.fill_between(numbers, low, high, color=_ACCENT, alpha=0.18, lw=0)
            axes.plot(numbers, mean, color=_ACCENT, lw=1.6)
            axes.set_yscale("symlog", linthresh=1)
            axes.set_title(kind, loc="left")
            axes.yaxis.grid(True)
            axes.minorticks_off()
            axes.margins(x=0.02)
        for axes in list(panels):
            axes.set_axis_off()

    return _svg("gamma", (9, 2.0 * -(-len(kinds) // 3) + 0.2), draw)


def layer_chart(norms: Sequence[tuple[str, int, int]]) -> str | None:
    """Share of weights that differ, by layer and kind of norm; None where none does.

    `norms` are name, weights that differ, and weights in all.
    """
    kinds = _by_kind((name, changed / max(1, elements)) for name, changed, elements in norms)
    if not any(changed for _, changed, _ in norms) or not kinds:
        return None
    layers = 1 + max(number for entries in kinds.values() for number, _ in entries)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, entries in enumerate(kinds.values()):
            for number, share in entries:
                place = (number - 0.46, row - 0.44)
                axes.add_patch(Rectangle(place, 0.92, 0.88, fc=_GRID, lw=0, alpha=0.5))
                axes.add_patch(Rectangle(place, 0.92, 0.88, fc=_ACCENT, lw=0, alpha=share))
                if layers <= 36:
                    text = f"{share:.0%}"[:-1]
                    axes.text(number, row, text, ha="center", va="center", fontsize=7.5, c=_INK)
        axes.set_xlim(-0.6, layers - 0.4)
        axes.set_ylim(len(kinds) - 0.4, -0.6)
        axes.set_yticks(range(len(kinds)), list(kinds))
        axes.set_xlabel("layer; numbers are per cent of the norm's weights")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[:].set_visible(False)

    return _svg("layers", (9, 0.34 * len(kinds) + 0.9), draw)


def _by_kind(norms: Iterable[tuple[str, Value]]) -> dict[str, list[tuple[int, Value]]]:
    """What is known of norms of numbered layers, by their name within the layer and by layer."""
    kinds: dict[str, list[tuple[int, Value]]] = {}
    for name, value in norms:
        match = _LAYER.search(name)
        if match:
            kind = name[match.end() + 1 :].removesuffix(".weight")
            kinds.setdefault(kind, []).append((int(match[1]), value))
    return {kind: sorted(layers, key=lambda item: item[0]) for kind, layers in kinds.items()}


def _svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Draw, and return SVG to be put into a page: no prologue, own ids, the page's colours."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
