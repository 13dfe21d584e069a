"""docs/troubleshooting.md quotes messages that the program has."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
#: What stands for a name or a number, in the page and in `texts`.
ANY = "…"
QUOTED = re.findall(r"^```text\n(.*?)\n```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@cache
def texts() -> str:
    """Every text of the program's code, a line each; of f-strings, with ANY for what is put in."""
    found = []
    for path in sorted((ROOT / "gemma_fold").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    part.value if isinstance(part, ast.Constant) else ANY for part in node.values
                )
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def is_said(message: str) -> bool:
    """Whether one text of the code is all of a message."""
    return f"\n{message}\n" in f"\n{texts()}\n"


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_one_of_the_program(message: str) -> None:
    assert is_said(message), f"no code of gemma_fold says: {message}"


def test_other_messages_would_be_noticed() -> None:
    assert len(QUOTED) > 40
    assert not is_said(QUOTED[0].replace("model_type", "model type"))
    assert not is_said(QUOTED[0].partition(";")[0]), "half a message is none"
