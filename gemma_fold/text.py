"""Plain text for people: tables, sizes, and what a terminal may be given."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

#: With what starts a line, or turns the direction of what follows.
_OTHER = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"[\0-\x1f{_OTHER}]")
_CONTROL_IN_LINE = re.compile(f"[\0-\x08\x0b-\x1f{_OTHER}]")


def printable(text: str, encoding: str = "utf-8", *, one_line: bool = False) -> str:
    """`text` as the terminal can show it; whatever it cannot, or must not act on, is escaped.

    Names from files may hold control characters, and paths bytes that are not text at all.
    """
    control = _CONTROL if one_line else _CONTROL_IN_LINE
    escaped = control.sub(lambda found: repr(found[0])[1:-1], text)
    return escaped.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def human_size(size: float) -> str:
    """Bytes in powers of 1000, as disks and file managers count."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def cut(text: str, limit: int) -> str:
    """`text`, its end left out where it is longer than `limit` letters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns padded to their widest cell, two spaces apart.

    On a terminal that is too narrow for that, each row is its first cell, and the others below it
    by their names.
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    columns = shutil.get_terminal_size().columns if sys.stdout and sys.stdout.isatty() else None
    if columns is not None and sum(widths) + 2 * (len(widths) - 1) > columns:
        return "\n".join(_stacked(header, line, columns) for line in lines[1:])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _stacked(header: Sequence[str], line: Sequence[str], columns: int) -> str:
    named = zip(header[1:], line[1:], strict=True)
    below = "; ".join(f"{name.lower()} {cell}" for name, cell in named if cell)
    indent = "    "
    wrapped = textwrap.wrap(
        below,
        columns,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join([line[0], *wrapped])
