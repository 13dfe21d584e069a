"""`rules`: the table of model families, or the rows of one of them."""

from __future__ import annotations

from typing import Any

from gemma_fold.errors import UnsupportedModelError
from gemma_fold.rules.export import SCHEMA, Export, export, families_of, plain_values, similar


def rules(model_type: str | None = None) -> Export:
    """The whole table, or the rows that answer for a model type or an architecture.

    Raises:
        UnsupportedModelError: no row does.
    """
    if model_type is None:
        return export()
    families = families_of(model_type)
    if not families:
        near = similar(model_type)
        hint = f"did you mean {' or '.join(near)}?" if near else "gemma-fold rules lists them all"
        raise UnsupportedModelError(f"no rule for the model type {model_type!r}; {hint}")
    return Export(SCHEMA, families, ())


def to_json(found: Export) -> dict[str, Any]:
    """Plain values for `rules --json`, in the form of `gemma_fold/rules/rules.schema.json`."""
    values: dict[str, Any] = plain_values(found)
    return values
