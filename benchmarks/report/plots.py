"""Draws bars of ours over the best there is otherwise, as an SVG for light and dark pages."""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

#: Of what a page's theme changes, in light and in dark.
INK, GREY, GRID, PAGE = "#1f2328", "#59636e", "#d1d9e0", "#ffffff"
COLOURS = ("#1f6feb", "#8250df")
DARK = {
    INK: "#f0f6fc",
    GREY: "#9198a1",
    GRID: "#3d444d",
    PAGE: "#0d1117",
    COLOURS[0]: "#4493f8",
    COLOURS[1]: "#ab7df8",
}
STYLE = {
    "svg.hashsalt": "gemma-fold",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GRID,
    "xtick.color": GREY,
    "ytick.color": INK,
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio, and between what it lies over the cases that it is the mean of."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Group:
    """What is compared, in a line and a smaller one, and a bar for each series or None."""

    label: str
    detail: str
    bars: tuple[Bar | None, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """Bars from zero; the line at 1 is what ours is compared with. `series` names their colours."""

    title: str
    axis: str
    baseline: str
    series: tuple[str, ...]
    groups: tuple[Group, ...]
    note: str


def digest(picture: Picture) -> str:
    """Of what is drawn, and of how: it changes with either, not with matplotlib's version."""
    how = Path(__file__).read_bytes()
    return hashlib.sha256(json.dumps(asdict(picture)).encode() + how).hexdigest()


def recorded(path: Path) -> str | None:
    """The digest of what a file shows."""
    match = re.search(r"<!-- shows ([0-9a-f]{64}) -->", path.read_text())
    return match[1] if match else None


def svg(picture: Picture) -> str:
    """The file."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        _figure(picture).savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    rules = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark} !important}}'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    start = text.index(">", text.index("<svg")) + 1
    head = f"\n<!-- shows {digest(picture)} -->\n{style}"
    return text[text.index("<svg") : start] + head + text[start:]


def _figure(picture: Picture) -> Figure:
    count = len(picture.series)
    step, top = 0.27 * count + 0.2, 0.95 if count > 1 else 0.72
    bottom = 0.8 + 0.16 * picture.note.count("\n")
    height = top + step * len(picture.groups) + bottom
    figure = Figure(figsize=(8.6, height), facecolor=PAGE)
    axes = figure.add_axes(
        (0.37, bottom / height, 0.59, 1 - (top + bottom) / height), facecolor=PAGE
    )
    for number, group in enumerate(picture.groups):
        _group(axes, picture, number, group)
    _scale(axes, picture)
    figure.text(0.02, 1 - 0.3 / height, picture.title, fontsize=12.5, weight="bold")
    if count > 1:
        _legend(figure, picture, 1 - 0.58 / height)
    figure.text(0.02, 0.1 / height, picture.note, fontsize=7.5, color=GREY, linespacing=1.4)
    return figure


def _group(axes: Any, picture: Picture, number: int, group: Group) -> None:
    """The labels and bars of one comparison; a whisker reaches from the lowest to the highest."""
    size = 0.78 / len(picture.series)
    for place, bar in enumerate(group.bars):
        if bar is None:
            continue
        at = number + (place - (len(group.bars) - 1) / 2) * size
        axes.barh(at, bar.ratio, height=size * 0.82, color=COLOURS[place], zorder=2)
        axes.plot([bar.low, bar.high], [at, at], color=INK, linewidth=1.1, zorder=4)
        for end in (bar.low, bar.high) if bar.low < bar.high else ():
            axes.plot(
                [end, end], [at - size / 6, at + size / 6], color=INK, linewidth=1.1, zorder=4
            )
        text = {"va": "center", "fontsize": 9, "weight": "bold", "zorder": 5}
        axes.text(0.012, at, f"{bar.ratio:.2f}", color=PAGE, **text)
    transform = axes.get_yaxis_transform()
    axes.text(-0.02, number - 0.13, group.label, transform=transform, ha="right", va="center")
    small = {"transform": transform, "ha": "right", "va": "center", "fontsize": 7.5, "color": GREY}
    axes.text(-0.02, number + 0.21, group.detail, **small)


def _scale(axes: Any, picture: Picture) -> None:
    most = max(bar.high for group in picture.groups for bar in group.bars if bar)
    axes.set_xlim(0, max(1.06, most * 1.04))
    axes.set_ylim(len(picture.groups) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xticks([tick / 4 for tick in range(int(axes.get_xlim()[1] * 4) + 1)])
    axes.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    axes.axvline(1, color=INK, linewidth=1.3, zorder=3)
    axes.text(1, -0.56, picture.baseline, ha="right", va="bottom", fontsize=8.5, color=INK)
    axes.set_xlabel(picture.axis, fontsize=8.5)
    axes.tick_params(length=0, labelsize=8.5)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def _legend(figure: Any, picture: Picture, height: float) -> None:
    at = 0.02
    for name, colour in zip(picture.series, COLOURS, strict=False):
        figure.text(at, height, "■", color=colour, fontsize=11, va="center")
        figure.text(at + 0.022, height, name, fontsize=9, va="center")
        at += 0.05 + 0.0095 * len(name)
