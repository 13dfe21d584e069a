"""What :func:`install` wraps in transformers, so that it loads and saves folded checkpoints.

These functions of transformers are wrapped, and nothing is copied:

* `PreTrainedConfig.get_config_dict` hands every loader, Auto or concrete, the original config with
  a mark. Programs that copy tensors from files and a config from transformers (mergekit does) would
  write it beside gammas, without the config lock. So `to_json_file` refuses a marked config; a
  model that is loaded or saved takes the mark off its own. `readers` meets those there that would
  add 1 to a gamma.
* `PreTrainedModel._load_pretrained_model` meets the built model before its weights are read. Its
  zero-centred norms become folded norms there, whose fp32 [H, 1] parameters take the gammas from
  disk unchanged; sharding, offloading and quantization of the rest go their usual way.
* `PreTrainedModel.save_pretrained` completes what it wrote to format 1.

No quantization config is involved, so a checkpoint that has one keeps it, and a folded model counts
as an ordinary one: it can be trained, cast, moved, and quantized on load.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from gemma_fold.checkpoint.locate import hub_id
from gemma_fold.checkpoint.source import CONFIG
from gemma_fold.engines.checks import check_version, native_config, read_folded
from gemma_fold.errors import CheckpointError, HostError, UnsupportedModelError, UsageError
from gemma_fold.format.names import MANIFEST, MODEL_TYPE

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise HostError(
        "transformers is not installed; install it with: pip install 'gemma-fold[transformers]'"
    ) from None

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from gemma_fold.checkpoint.target import target_folder
from gemma_fold.engines.transformers.norms import FoldedNorm
from gemma_fold.engines.transformers.readers import unfold_for_readers
from gemma_fold.engines.transformers.save import save_folded
from gemma_fold.engines.transformers.weights import load_gammas, load_raw_gains

_installed = False
#: The attribute of a config that holds the name of the checkpoint. It is not serialized.
_MARK = "_gemma_fold_source"
_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "proxies",
    "token",
    "revision",
    "local_files_only",
    "subfolder",
)


class UnknownModelTypeError(UnsupportedModelError, ValueError):
    """The installed transformers does not know the original's model type.

    A ValueError too, because that is what transformers raises for a type it does not know.
    """


def load(path_or_hub_id: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a folded checkpoint as the transformers model it was made from.

    The class is the one the original's config names.

    Args:
        path_or_hub_id: a folder or a Hub id (`org/name[@revision]`).
        **kwargs: of `from_pretrained` (dtype, device_map, ...).

    Returns:
        A model whose norms are folded.

    Raises:
        CheckpointError: not a folded checkpoint, of a later format, or damaged.
        UnsupportedModelError: the installed transformers does not know the model.
        HostError: transformers is missing, or a version that is not supported.
    """
    install()
    name = os.fspath(path_or_hub_id)
    found = hub_id(name)
    if found is not None:
        name, revision = found
        kwargs |= {"revision": revision} if revision else {}
    elif not os.path.isdir(name):
        problem = "is a file" if os.path.exists(name) else "does not exist"
        raise CheckpointError(f"{name} {problem}; give the folder of a folded checkpoint")
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    found = cached_file(name, CONFIG, _raise_exceptions_for_missing_entries=False, **hub)
    if found is None:
        raise CheckpointError(f"{name} has no {CONFIG}, so it is not a folded checkpoint")
    config = PreTrainedConfig._dict_from_json_file(found)
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{name} is not a folded checkpoint (its model type is {config.get('model_type')}); "
            "fold it with `gemma-fold convert`, or load it and call gemma_fold.fold_model"
        )
    base = native_config(config, name)
    _check_model_type(base, name)
    return _model_class(base, name).from_pretrained(name, **kwargs)


def _model_class(base: dict[str, Any], name: str) -> Any:
    architectures = base.get("architectures") or ["AutoModel"]
    cls = getattr(transformers, str(architectures[0]), None)
    if cls is None:
        raise UnknownModelTypeError(_too_old(name, str(architectures[0]), base))
    return cls


def _check_model_type(base: dict[str, Any], name: str) -> None:
    if base.get("model_type") not in CONFIG_MAPPING and "auto_map" not in base:
        raise UnknownModelTypeError(_too_old(name, str(base.get("model_type")), base))


def _too_old(name: str, what: str, base: dict[str, Any]) -> str:
    needed = base.get("transformers_version")
    advice = f"it was saved by {needed}" if needed else "a later version may"
    return (
        f"{name} holds {what}, which transformers {transformers.__version__} does not know; "
        f"{advice}: pip install --upgrade 'transformers{f'>={needed}' if needed else ''}'"
    )


def _lend(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The original config with the mark, which the config object made from it keeps."""
    unfold_for_readers()
    lent = {**native_config(config, where), _MARK: where}
    _check_model_type(lent, where)
    return lent


def _release(config: Any) -> None:
    """Take the mark off the config of a model."""
    vars(config).pop(_MARK, None)


def _without_mark(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @wraps(original)
    def to_dict(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = original(self, *args, **kwargs)
        found.pop(_MARK, None)
        return found

    return to_dict


def _refusing(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def to_json_file(self: Any, *args: Any, **kwargs: Any) -> None:
        source = vars(self).get(_MARK)
        if source is not None:
            raise UsageError(
                f"{source} is a folded checkpoint, whose original config must not be saved without "
                f"the original's weights; `gemma-fold unfold {source}` and start from the result"
            )
        original(self, *args, **kwargs)

    return to_json_file


def _wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kw: Any
    ) -> Any:
        def go_on() -> Any:
            return original(model, state_dict, checkpoint_files, load_config, *args, **kw)

        folder = None if state_dict else _folded_folder(checkpoint_files, load_config)
        if folder is None:
            return load_raw_gains(model, go_on)
        result = load_gammas(model, folder, checkpoint_files, go_on)
        _release(model.config)
        return result

    return load_pretrained_model


def _folded_folder(files: list[str] | None, load_config: Any) -> Path | None:
    """Where the manifest of a folded checkpoint lies, or None for any other checkpoint."""
    if not files or not str(files[0]).endswith(".safetensors"):
        return None
    folder = Path(files[0]).parent
    if not (folder / MANIFEST).is_file():
        if not _is_folded(_fetch(folder, CONFIG, load_config)):
            return None
        if _fetch(folder, MANIFEST, load_config) is None:
            raise CheckpointError(
                f"{folder} has lost its {MANIFEST}; fetch it, or fold the original again"
            )
    return folder


def _fetch(folder: Path, name: str, load_config: Any) -> Path | None:
    """A file beside the weights; from the Hub only if the weights come from there."""
    if (folder / name).is_file():
        return folder / name
    source = load_config.pretrained_model_name_or_path
    if source is None or os.path.isdir(source):
        return None
    options = {**load_config.download_kwargs, "_raise_exceptions_for_missing_entries": False}
    found = cached_file(source, name, **options)
    return Path(found) if found else None


def _is_folded(config: Path | None) -> bool:
    if config is None:
        return False
    try:
        return bool(json.loads(config.read_bytes()).get("model_type") == MODEL_TYPE)
    except (ValueError, AttributeError):
        return False  # whoever reads it next reports what is wrong with it


def _wrap_save(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        _release(self.config)  # of a model made from the config alone: its weights are its own
        if getattr(self, "_hf_peft_config_loaded", False):  # saves its adapters only
            return original(self, save_directory, *args, **kwargs)
        if not any(isinstance(module, FoldedNorm) for module in self.modules()):
            result = original(self, save_directory, *args, **kwargs)
            # Of what was there before; a save that fails may have left the rest of it, too.
            with suppress(FileNotFoundError, NotADirectoryError):
                (Path(save_directory) / MANIFEST).unlink()
            return result
        bound = inspect.signature(original).bind(self, save_directory, *args, **kwargs)
        return save_folded(original, self, target_folder(save_directory), bound)

    return save_pretrained


def install() -> None:
    """Teach transformers the format, once a process.

    From then on every loader (Auto classes, concrete ones, pipelines) takes folded checkpoints, and
    `save_pretrained` of a folded model writes one.

    Raises:
        HostError: this version of transformers is not supported; nothing was wrapped.
    """
    global _installed
    if _installed:
        return
    load: Any = getattr(PreTrainedModel, "_load_pretrained_model", None)
    parameters = ["model", "state_dict", "checkpoint_files", "load_config"]
    check_version("transformers", transformers.__version__, load, parameters)
    get_config_dict = PreTrainedConfig.__dict__["get_config_dict"].__func__
    PreTrainedConfig.get_config_dict = classmethod(read_folded(get_config_dict, _lend))
    PreTrainedModel._load_pretrained_model = staticmethod(_wrap_load(load))
    PreTrainedModel.save_pretrained = _wrap_save(PreTrainedModel.save_pretrained)
    PreTrainedConfig.to_dict = _without_mark(PreTrainedConfig.to_dict)
    PreTrainedConfig.to_json_file = _refusing(PreTrainedConfig.to_json_file)
    _installed = True
