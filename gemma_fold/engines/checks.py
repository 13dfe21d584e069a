"""A folded checkpoint's config, the plug-ins that read it, and whether a model took all of it."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from gemma_fold.checkpoint.source import CONFIG
from gemma_fold.errors import CheckpointError, GemmaFoldError, HostError, first_line
from gemma_fold.format.manifest import unwrap_config
from gemma_fold.format.names import MANIFEST, MODEL_TYPE

#: The first and the last version of each engine whose fused counts were checked.
TESTED = {
    "transformers": ("5.17", "5.24"),
    "vllm": ("0.26", "0.33"),
    "sglang": ("0.5.17", "0.5.23"),
}
#: Entry points by which an engine finds gemma-fold, and the variable that can leave it out.
_PLUGINS = {
    "vllm": ("vllm.general_plugins", "VLLM_PLUGINS"),
    "sglang": ("sglang.srt.plugins", "SGLANG_PLUGINS"),
}
_NAME = "gemma_fold"

Config = dict[str, Any]
_registered: set[str] = set()


def native_config(config: Config, where: str) -> Config:
    """The original config inside a folded `config.json`; any other config comes back as it is.

    The dtype is filled in if the original names none, because loaders would then take that of
    the fp32 gammas.

    Raises:
        CheckpointError: a later format, or a damaged config.
    """
    if config.get("model_type") != MODEL_TYPE:
        return config
    base = unwrap_config(config, Path(where) / CONFIG)
    # Loaders add keys of their own, such as the commit of a download.
    native = {**base, **{key: value for key, value in config.items() if key.startswith("_")}}
    if native.get("dtype") is None and native.get("torch_dtype") is None and "dtype" in config:
        native["dtype"] = config["dtype"]
    return native


def marked_config(config: Config, where: str) -> Config:
    """:func:`native_config` with the folded checkpoint's own block: format, tensors, version.

    It stays under its name: a config that has it is of a folded checkpoint.
    """
    return {**native_config(config, where), MODEL_TYPE: config[MODEL_TYPE]}


def folded_block(config: Any) -> Mapping[str, Any] | None:
    """The block that :func:`marked_config` left in a config object; None if there is none."""
    block = getattr(config, MODEL_TYPE, None)
    return block if isinstance(block, dict) else None


def lock_problem(block: Mapping[str, Any], where: str, engine: str) -> str:
    """Why an engine cannot distinguish gammas from raw weights; empty if there is a tensor lock."""
    if block.get("tensor_lock", True):
        return ""
    return (
        f"{where} was folded without the tensor lock, so {engine} cannot distinguish its gammas "
        "from raw weights; fold the original again without --no-tensor-lock"
    )


def read_folded(
    original: Callable[..., Any], change: Callable[[Config, str], Config]
) -> Callable[..., Any]:
    """`PreTrainedConfig.get_config_dict`, with the config of a folded checkpoint through `change`.

    Args:
        original: the function of the class method.
        change: is given the config and where it comes from.
    """

    @wraps(original)
    def get_config_dict(cls: type, pretrained: Any, **kwargs: Any) -> Any:
        config, rest = original(cls, pretrained, **kwargs)
        if config.get("model_type") == MODEL_TYPE:
            config = change(config, str(pretrained))
        return config, rest

    return get_config_dict


def wrap_innermost(change: Callable[[Config, str], Config]) -> None:
    """Have every reader in this process read the config of a folded checkpoint through `change`.

    What wrapped the reader before, as the transformers integration does, would take away the mark.
    """
    from transformers import PreTrainedConfig

    original = inspect.unwrap(PreTrainedConfig.__dict__["get_config_dict"].__func__)
    PreTrainedConfig.get_config_dict = classmethod(read_folded(original, change))


def register_once(engine: str, module: str, logger: str) -> None:
    """Call `install()` of a module, the first time in this process. Never raises.

    If that does, one warning gives the reason; the engine then serves what it always did, and
    a folded checkpoint is refused with the same words when its config is read.

    Args:
        engine: its name, for messages.
        module: its `install` attaches all of gemma-fold, or raises before it changed anything.
        logger: that the engine shows its users.
    """
    if engine in _registered:
        return
    _registered.add(engine)
    try:
        import_module(module).install()
    except Exception as error:
        problem = _explain(engine, error)
        logging.getLogger(logger).warning("gemma-fold is not attached: %s", problem)

        def refuse(config: Config, where: str) -> Config:
            raise HostError(problem)

        with suppress(Exception):  # without transformers, the engine reads no config either
            wrap_innermost(refuse)


def _explain(engine: str, error: Exception) -> str:
    if isinstance(error, GemmaFoldError):
        return str(error)
    reason = f"{type(error).__name__}: {first_line(error)}"
    return (
        f"gemma-fold cannot attach to this version of {engine} ({reason}); "
        f"upgrade gemma-fold, or install a version of {engine} that its documentation names"
    )


def numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, to compare."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def check_version(engine: str, version: str, function: object, parameters: Sequence[str]) -> None:
    """Check that an engine is one that can be attached to.

    Args:
        engine: its name.
        version: of it; without numbers, as a build from source may have it, any will do.
        function: by which it loads models.
        parameters: the first of that function, as gemma-fold relies on them.

    Raises:
        HostError: it is too old, or loads models in another way.
    """
    oldest, newest = TESTED[engine.lower()]
    if numbers(version) and numbers(version) < numbers(oldest):
        raise HostError(
            f"{engine} {version} is too old for folded checkpoints; "
            f"pip install --upgrade '{engine.lower()}>={oldest}'"
        )
    try:
        found = list(inspect.signature(function).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        found = []
    if found[: len(parameters)] != list(parameters):
        raise HostError(
            f"{engine} {version} loads models in a way this gemma-fold does not know (it was "
            f"checked up to {newest}); upgrade gemma-fold, or install an earlier {engine}"
        )


def plugin_problem(engine: str) -> str:
    """Why an engine would not load gemma-fold's plug-in; empty if it would, or needs none."""
    if engine not in _PLUGINS:
        return ""
    group, variable = _PLUGINS[engine]
    if not any(point.name == _NAME for point in entry_points(group=group)):
        return (
            f"{engine} does not find gemma-fold: it finds plug-ins of installed packages only; "
            f"install gemma-fold with pip into the environment of {engine}"
        )
    value = os.environ.get(variable)
    if engine == "vllm":  # takes names as they are; an empty value leaves out every plug-in
        allowed = None if value is None else value.split(",")
    else:
        allowed = [name.strip() for name in (value or "").split(",") if name.strip()] or None
    if allowed is not None and _NAME not in allowed:
        return (
            f"{variable}={value} keeps {engine} from loading {_NAME}; add it, or unset {variable}"
        )
    return ""


def check_loaded(
    gains: Sequence[str],
    missing: Iterable[str],
    mismatched: Iterable[str],
    *,
    folded: int,
    unused: int,
    folder: Path,
) -> None:
    """Check that every folded norm of a model took its gamma from the checkpoint.

    Args:
        gains: parameter names of the model's folded norms.
        missing: names that the loader reports as missing.
        mismatched: names that the loader reports as of another shape.
        folded: how many tensors the manifest lists.
        unused: how many tensors on disk this model does not use.
        folder: of the checkpoint.

    Raises:
        CheckpointError: one of them did not.
    """
    lost = sorted(set(gains) & {*missing, *mismatched})
    if lost:
        raise CheckpointError(lost_gammas(folder, lost, len(gains)))
    if len(gains) > folded or (len(gains) < folded and not unused):
        raise CheckpointError(
            f"the model has {len(gains)} zero-centred norms but {folder / MANIFEST} lists "
            f"{folded}; fold the original again with this version of gemma-fold"
        )


def lost_gammas(where: object, lost: Sequence[str], norms: int) -> str:
    """The message for a model of which `lost`, of `norms` norms, took no gamma."""
    return (
        f"{where} gives no gamma for {lost[0]} ({len(lost)} of {norms} norms); "
        f"the weights and {MANIFEST} belong to another model: fold the original again"
    )
