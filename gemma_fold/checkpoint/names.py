"""Names that come from files: a path inside the checkpoint's folder on every system, or an error.

A manifest, an index or a Hub listing from elsewhere must not make us read or write anywhere else,
and a checkpoint travels: a name that is harmless on one system may leave the folder on another.
"""

from __future__ import annotations

import re
from pathlib import Path

from gemma_fold.errors import CheckpointError

_MOST_BYTES = 255  # of one component, on nearly every file system
_MOST_BYTES_IN_ALL = 1024  # leaves room for the folder within a path's 4096
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")
_DRIVE = re.compile(r"[A-Za-z]:")
_DEVICE = re.compile(
    r"(?:CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(?:COM|LPT)[0-9\xb9\xb2\xb3])[ ]*(?:[.:].*)?",
    re.IGNORECASE | re.DOTALL,
)


def check_name(name: str, where: Path | str) -> str:
    """Return `name` if it is a plain relative path with `/` that stays inside its folder.

    Args:
        name: as a file spells it.
        where: what names it, for the message.

    Raises:
        CheckpointError: the name is none, on this system or another.
    """
    reason = unsafe_reason(name)
    if reason is not None:
        raise CheckpointError(
            f"{where} points outside the folder, to {shown(name)} ({reason}); "
            "do not trust this checkpoint"
        )
    return name


def check_top_name(name: str, where: Path | str) -> str:
    """As `check_name`, for a file that must lie at the top of the folder."""
    if "/" in name:
        raise CheckpointError(
            f"{where} points outside the folder, to {shown(name)} (a path, not a file's name); "
            "do not trust this checkpoint"
        )
    return check_name(name, where)


def work_folder_name(name: str) -> str:
    """What the work folder of the folder `name` is called."""
    return f".{name}.gemma-fold"


def is_work_folder_name(name: str) -> bool:
    """Whether a folder's name is that of a work folder."""
    return name.startswith(".") and name.endswith(".gemma-fold")


def unsafe_reason(name: str) -> str | None:
    """Why `name` is not the path of a file inside a folder; None if it is one."""
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "not text in UTF-8"
    if not name:
        return "an empty name"
    if name.startswith("/"):
        return "an absolute path"
    if size > _MOST_BYTES_IN_ALL:
        return f"longer than {_MOST_BYTES_IN_ALL} bytes"
    if "\\" in name:
        return "a backslash"
    if _CONTROL.search(name):
        return "a control character"
    return next(filter(None, map(_unsafe_part, name.split("/"))), None)


def shown(value: object) -> str:
    """Something from a file for a message: quoted, escaped, and cut if it is long."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "...")
    try:
        text = repr(value)
    except RecursionError:
        return f"a nested {type(value).__name__}"
    return text if len(text) <= 80 else text[:80] + "..."


def _unsafe_part(part: str) -> str | None:
    if not part:
        return "an empty part"
    if part in (".", ".."):
        return f"the part {part!r}"
    if len(part.encode()) > _MOST_BYTES:
        return f"a part longer than {_MOST_BYTES} bytes"
    if _DRIVE.match(part):
        return "a drive letter"
    if _DEVICE.fullmatch(part):
        return "a device's name on Windows"
    return None
