"""The all-reduce workspace of an engine's group of ranks, made once a process."""

from __future__ import annotations

from typing import Any

from gemma_fold.ops import AllReduceWorkspace
from gemma_fold.ops.collectives.workspace import find


def shared_workspace(name: str, group: Any, **sizes: Any) -> str | None:
    """The workspace `name`, made of `group` and `sizes` on first use. Collective then.

    Returns:
        Its name; None if the engine should reduce: on GPUs that do not reach each other's memory
        it has more ways to than the library's.
    """
    try:
        workspace = find(name)
    except ValueError:
        workspace = AllReduceWorkspace(group, name=name, **sizes)
    return None if workspace.device.type == "cuda" and not workspace.fused else name
