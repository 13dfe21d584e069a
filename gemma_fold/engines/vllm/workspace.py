"""The all-reduce workspace of the tensor-parallel group, made once a process."""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_tp_group

from gemma_fold.ops import AllReduceWorkspace
from gemma_fold.ops.collectives.workspace import find


def tensor_parallel_workspace(vllm_config: Any, model_config: Any) -> str | None:
    """The name of the workspace for this model, or None where vLLM should reduce. Collective.

    The name is the same in every run, because vLLM's cached graphs hold it.
    """
    group = get_tp_group()
    if group.world_size == 1 or vllm_config.parallel_config.enable_dbo:
        return None  # two batches at once would share the buffers
    name = f"gemma_fold.{group.unique_name}"
    try:
        workspace = find(name)
    except ValueError:
        workspace = AllReduceWorkspace(
            group.device_group,
            hidden=model_config.get_hidden_size(),
            max_tokens=min(2048, vllm_config.scheduler_config.max_num_batched_tokens),
            dtype=model_config.dtype,
            name=name,
        )
    if workspace.device.type == "cuda" and not workspace.fused:
        return None  # vLLM's own all-reduce knows more ways than the library's
    return name


def explain(workspace: str | None) -> str:
    """One line about who reduces."""
    return "vLLM does the all-reduces" if workspace is None else find(workspace).explain()
