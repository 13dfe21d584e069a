"""GEMMA_FOLD: which kernels the norms of an inference engine run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal

from gemma_fold.errors import UsageError

VARIABLE = "GEMMA_FOLD"
#: require: native, and an error where something that could be fused is not.
VALUES = ("native", "stock", "require")

#: native: gemma-fold's operators on fp32 gamma. stock: the engine's own norms, with w = gamma - 1.
Mode = Literal["native", "stock"]


def requested_mode() -> Mode | None:
    """The mode that GEMMA_FOLD asks for; None where it is unset or empty.

    Raises:
        UsageError: it has another value.
    """
    value = requested(VARIABLE, VALUES)
    return None if value is None else "stock" if value == "stock" else "native"


def required() -> bool:
    """Whether GEMMA_FOLD makes whatever is not fused an error.

    Raises:
        UsageError: it has another value.
    """
    return requested(VARIABLE, VALUES) == "require"


def requested(variable: str, choices: Iterable[str]) -> str | None:
    """The value of an environment variable, without blanks and in lower case; None if empty.

    Raises:
        UsageError: it is none of `choices`.
    """
    given = os.environ.get(variable, "")
    value = given.strip().lower()
    if not value:
        return None
    if value not in choices:
        *rest, last = map(repr, choices)
        raise UsageError(f"invalid {variable}={given!r}: expected {', '.join(rest)} or {last}")
    return value
