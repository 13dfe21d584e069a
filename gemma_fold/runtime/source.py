"""What a function of an engine does, as a number to compare with the versions that were read."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def statements_digest(function: Callable[..., Any] | None) -> str:
    """sha256 of the statements of `function`, layout and comments aside; "" where there are none.

    The signature is no part of it.
    """
    try:
        source = textwrap.dedent(inspect.getsource(function))  # type: ignore[arg-type]
        tree = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    statements = ast.unparse(ast.Module(tree.body, []))
    return hashlib.sha256(statements.encode()).hexdigest()
