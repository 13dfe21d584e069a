"""`rules`: the table of model families, or the rows of one of them."""

from __future__ import annotations

from typing import Any

from gemma_fold.errors import UnsupportedModelError
from gemma_fold.format.names import MODEL_TYPE
from gemma_fold.rules.export import Export, export, export_of, plain_values, similar

_LONGEST = 80  # real names are shorter


def rules(model_type: str | None = None) -> Export:
    """The whole table, or the rows that answer for a model type or an architecture.

    Raises:
        UnsupportedModelError: no row does.
    """
    if model_type is None:
        return export()
    found = export_of(model_type)
    if not found.families:
        shown = model_type if len(model_type) <= _LONGEST else f"{model_type[:_LONGEST]}..."
        raise UnsupportedModelError(f"no rule for the model type {shown!r}; {_hint(model_type)}")
    return found


def _hint(model_type: str) -> str:
    if model_type == MODEL_TYPE:
        return "it says that a checkpoint is folded: ask for the one in its base_config"
    near = similar(model_type[:_LONGEST])
    return f"did you mean {' or '.join(near)}?" if near else "gemma-fold rules lists them all"


def to_json(found: Export) -> dict[str, Any]:
    """Plain values for `rules --json`, in the form of `gemma_fold/rules/rules.schema.json`."""
    values: dict[str, Any] = plain_values(found)
    return values
