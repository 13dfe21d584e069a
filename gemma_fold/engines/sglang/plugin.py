"""What gemma-fold hooks in SGLang, and whether this version of SGLang has it."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from gemma_fold.engines.checks import TESTED, marked_config
from gemma_fold.engines.sglang import all_reduce, boundary, weights
from gemma_fold.errors import HostError
from gemma_fold.format.names import MODEL_TYPE

_LOADER = "sglang.srt.model_loader.loader"
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"


@dataclass(frozen=True, slots=True)
class Hook:
    """One hook.

    Attributes:
        parameters: those of the target that the hook relies on.
    """

    target: str
    function: Callable[..., Any]
    kind: HookType
    parameters: tuple[str, ...]


def install() -> None:
    """Register every hook, or none.

    Raises:
        HostError: one does not fit this version of SGLang.
    """
    for hook in _HOOKS:
        _check(hook)
    for hook in (*_HOOKS, *_edges()):
        HookRegistry.register(hook.target, hook.function, hook.kind)


def _edges() -> Iterator[Hook]:
    """Hooks on what this version has of the fusions at the edges of a layer."""
    for target in boundary.DECLINING:
        with suppress(ImportError, AttributeError):
            pkgutil.resolve_name(target)
            yield Hook(target, boundary.decline, HookType.AROUND, ())


def native_config_dict(result: Any, cls: Any, name: Any = "", *args: Any, **kwargs: Any) -> Any:
    """After `PreTrainedConfig.get_config_dict`: the original config of a folded checkpoint."""
    config, rest = result
    if config.get("model_type") != MODEL_TYPE:
        return result
    return marked_config(config, str(name)), rest


def _check(hook: Hook) -> None:
    try:
        found = inspect.signature(pkgutil.resolve_name(hook.target)).parameters
    except (ImportError, AttributeError) as error:
        raise _unsupported(hook.target) from error
    if any(name not in found for name in hook.parameters):
        raise _unsupported(hook.target)


def _unsupported(target: str) -> HostError:
    return HostError(
        f"gemma-fold cannot attach to SGLang {version('sglang')}: {target} is not what it was in "
        f"{TESTED['sglang'][1]}, which was checked; install that"
    )


_HOOKS = (
    Hook(
        "transformers.configuration_utils.PreTrainedConfig.get_config_dict",
        native_config_dict,
        HookType.AFTER,
        ("pretrained_model_name_or_path",),
    ),
    Hook(
        f"{_LOADER}._initialize_model",
        weights.initialize,
        HookType.AROUND,
        ("model_config", "load_config"),
    ),
    Hook(f"{_LOADER}.get_model_loader", weights.follow_loader, HookType.AFTER, ("load_config",)),
    Hook(
        "sglang.srt.layers.layernorm._forward_with_allreduce_fusion",
        all_reduce.forward_fused,
        HookType.AROUND,
        ("norm_module", "x", "residual", "post_residual_addition", "weight", "use_attn_tp_group"),
    ),
    Hook(
        f"{_UPDATER}._model_load_weights_direct",
        weights.load_direct,
        HookType.AROUND,
        ("model", "named_tensors"),
    ),
    Hook(
        f"{_UPDATER}.WeightUpdater.update_weights_from_disk",
        weights.update_from_disk,
        HookType.AROUND,
        ("model_path", "load_format"),
    ),
    Hook(
        f"{_UPDATER}.WeightUpdater.update_weights_from_tensor",
        weights.follow_update,
        HookType.AFTER,
        ("named_tensors", "load_format"),
    ),
)
