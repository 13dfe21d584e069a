"""What a function of an engine does, as a number to compare with the versions that were read."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
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
    statements = bare_targets(ast.unparse(ast.Module(tree.body, [])))
    return hashlib.sha256(statements.encode()).hexdigest()


def bare_targets(statements: str) -> str:
    """`statements` as Python 3.11 and later unparse them.

    Python 3.10 puts parentheses around several targets of an assignment or a loop.
    """
    statements = re.sub(r"^(\s*)\(([^()]*)\) = ", r"\1\2 = ", statements, flags=re.MULTILINE)
    return re.sub(r"\bfor \(([^()]*)\) in ", r"for \1 in ", statements)
