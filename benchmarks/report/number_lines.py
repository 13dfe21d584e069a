"""The picture of docs/zero_centred.md: what becomes of weights near 0 when 1 is added to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.plots import COLOURS, DARK, GREY, INK, PAGE

Floats = NDArray[np.float32]

TITLE = "Add 1 to a bf16 weight, and bf16 cannot hold the sum"
WIDTH, HEIGHT = 640, 456
LEFT, RIGHT = 24, 616
#: What the lines show of w; gamma is shown 1 higher.
EXTENT = 0.02
#: Weights that are followed, as many as can be told apart.
WEIGHTS = 25
TOP, MIDDLE, BOTTOM = 108, 216, 316


def bf16(values: Floats) -> Floats:
    """The nearest bf16 number of each finite value; of two as near, the even one."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def followed() -> Floats:
    """Weights w as a bf16 checkpoint could hold them."""
    return bf16(np.linspace(-0.92 * EXTENT, 0.92 * EXTENT, WEIGHTS, dtype=np.float32))


def _bf16_between(low: float, high: float) -> Floats:
    """Every bf16 number of an interval."""
    every = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    return np.sort(every[(every >= low) & (every <= high)])


def svg() -> str:
    """The file."""
    w = followed()
    one = np.float32(1)
    exact, rounded = one + w, bf16(one + w)
    dark = "".join(
        f'[style*="{part}: {light}"]{{{part}:{colour} !important}}'
        for light, colour in DARK.items()
        for part in ("fill", "stroke")
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'class="narrow" font-family="system-ui, sans-serif">',
        f"<style>@media (prefers-color-scheme: dark){{{dark}}}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" style="fill: {PAGE}"/>',
        _text(LEFT - 8, 28, TITLE, INK, 18, bold=True),
        *_falls(w, rounded - one, TOP, COLOURS[1]),
        *_falls(w, exact - one, BOTTOM, COLOURS[0]),
        *_row(TOP, _bf16_between(1 - EXTENT, 1 + EXTENT) - 1),
        *_row(MIDDLE, _drawn()),
        *_row(BOTTOM, np.empty(0, np.float32)),
        *_named(TOP - 34, "gamma in bf16", _gains(rounded)),
        *_named(MIDDLE - 34, "w in bf16, as it is stored", f"{WEIGHTS} weights near 0"),
        *_named(BOTTOM + 52, "gamma in float32", _gains(exact)),
        *_dots(rounded - one, TOP, COLOURS[1]),
        *_dots(w, MIDDLE, INK),
        *_dots(exact - one, BOTTOM, COLOURS[0]),
        *_scale(BOTTOM + 24, ("0.98", "0.99", "1", "1.01", "1.02")),
        *(_text(LEFT - 8, HEIGHT - 32 + 18 * n, line, GREY, 13) for n, line in enumerate(_notes())),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _gains(gamma: Floats) -> str:
    return f"{len(np.unique(gamma))} different gains of {WEIGHTS}"


def _notes() -> tuple[str, str]:
    ticks = len(_bf16_between(1 - EXTENT, 1 + EXTENT))
    stored = len(_bf16_between(-EXTENT, EXTENT))
    return (
        f"Ticks are bf16 numbers: {stored:,} lie within {EXTENT} of 0, of which a few are drawn,",
        f"and {ticks} within {EXTENT} of 1. float32 has {_float32_near_one():,} there.",
    )


def _float32_near_one() -> int:
    low, high = np.array([1 - EXTENT, 1 + EXTENT], np.float32).view(np.uint32)
    return int(high) - int(low) + 1


def _drawn() -> Floats:
    """Some of the stored numbers' ticks: all of those far from 0 are as close as a pixel."""
    return _bf16_between(-EXTENT, EXTENT)[::4]


def _at(value: float) -> float:
    return round((LEFT + RIGHT) / 2 + float(value) / EXTENT * (RIGHT - LEFT) / 2, 1)


def _row(y: int, ticks: Floats) -> Iterator[str]:
    yield _line(LEFT, y, RIGHT, y, GREY)
    for x in dict.fromkeys(map(_at, ticks)):
        yield _line(x, y - 7, x, y + 7, GREY)


def _named(y: int, name: str, detail: str) -> Iterator[str]:
    yield _text(LEFT - 8, y, name, INK, 15, bold=True)
    yield _text(LEFT - 8, y + 18, detail, GREY, 13)


def _falls(start: Floats, end: Floats, y: int, colour: str) -> Iterator[str]:
    for a, b in zip(start, end, strict=True):
        yield _line(_at(a), MIDDLE, _at(b), y, colour, 0.55)


def _dots(values: Floats, y: int, colour: str) -> Iterator[str]:
    for x in dict.fromkeys(map(_at, values)):
        yield f'<circle cx="{x}" cy="{y}" r="4" style="fill: {colour}"/>'


def _scale(y: int, labels: Sequence[str]) -> Iterator[str]:
    for label in labels:
        x = _at(float(label) - 1)
        yield _text(x, y, label, GREY, 13, anchor="middle")


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, opacity: float = 1) -> str:
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke-opacity="{opacity}" '
        f'style="stroke: {colour}"/>'
    )


def _text(
    x: float, y: float, text: str, colour: str, size: int, *, bold: bool = False, anchor: str = ""
) -> str:
    """Text, with the colour of the page around its letters, so that lines pass behind it."""
    weight = ' font-weight="bold"' if bold else ""
    where = f' text-anchor="{anchor}"' if anchor else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}"{weight}{where} stroke-width="5" '
        f'style="fill: {colour}; stroke: {PAGE}; paint-order: stroke">{escape(text)}</text>'
    )
