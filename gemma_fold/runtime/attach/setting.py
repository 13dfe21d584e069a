"""What the environment variable GEMMA_FOLD asks for."""

from __future__ import annotations

import os

from gemma_fold.errors import UsageError

VARIABLE = "GEMMA_FOLD"
#: require: native, and an error where something that could be fused is not.
VALUES = ("stock", "native", "require")


def wanted() -> str:
    """One of VALUES, or empty where the variable is not set. Raises UsageError for another."""
    value = os.environ.get(VARIABLE, "").strip().lower()
    if value and value not in VALUES:
        raise UsageError(
            f"{VARIABLE}={value} is no mode; use native or stock, or require: native, and an error "
            "where something is not fused"
        )
    return value


def required() -> bool:
    """Whether what is not fused is an error."""
    return wanted() == "require"
