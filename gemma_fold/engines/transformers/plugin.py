"""What :func:`install` wraps in transformers, so that it loads and saves folded checkpoints.

These functions of transformers are wrapped, and nothing is copied:

* `PreTrainedConfig.get_config_dict` hands every loader, Auto or concrete, the original config,
  which `lent_config` keeps off the disk until a model is loaded with it. `readers` meets those
  there that would add 1 to a gamma.
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

from gemma_fold.checkpoint.header import read_header
from gemma_fold.checkpoint.locate import hub_id
from gemma_fold.checkpoint.source import CONFIG
from gemma_fold.engines.checks import check_loaded, native_config
from gemma_fold.errors import CheckpointError, HostError, UnsupportedModelError
from gemma_fold.format.manifest import read_manifest
from gemma_fold.format.names import MANIFEST, MODEL_TYPE
from gemma_fold.format.reader import check_gammas

MINIMUM = (5, 17)

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise HostError(
        "transformers is not installed; install it with: pip install 'gemma-fold[transformers]'"
    ) from None

from transformers import PreTrainedConfig, PreTrainedModel  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.utils import cached_file  # noqa: E402

from gemma_fold.checkpoint.target import target_folder  # noqa: E402
from gemma_fold.engines.transformers.lent_config import keep_lent_configs_off_disk, lend, release  # noqa: E402
from gemma_fold.engines.transformers.models import adopt_norms  # noqa: E402
from gemma_fold.engines.transformers.norms import FoldedNorm  # noqa: E402
from gemma_fold.engines.transformers.readers import unfold_for_readers  # noqa: E402
from gemma_fold.engines.transformers.save import save_folded  # noqa: E402

_installed = False
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

    `path_or_hub_id` is a folder or a Hub id (`org/name[@revision]`); `kwargs` go to
    `from_pretrained` (dtype, device_map, ...). The class is the one the original's config names.

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


def _wrap_get_config_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def get_config_dict(cls: type, pretrained: str | os.PathLike[str], **kwargs: Any) -> Any:
        unfold_for_readers()
        config, rest = original(cls, pretrained, **kwargs)
        if config.get("model_type") == MODEL_TYPE:
            config = lend(native_config(config, str(pretrained)), str(pretrained))
            _check_model_type(config, str(pretrained))
        return config, rest

    return get_config_dict


def _wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kw: Any
    ) -> Any:
        def go_on() -> Any:
            return original(model, state_dict, checkpoint_files, load_config, *args, **kw)

        folder = None if state_dict else _folded_folder(checkpoint_files, load_config)
        if folder is None:
            return _load_raw_gains(model, go_on)
        manifest = read_manifest(folder)
        headers = {Path(file).name: read_header(Path(file)) for file in checkpoint_files}
        check_gammas(manifest, headers, folder)
        norms = adopt_norms(model, locked=manifest.tensor_lock)
        info, offloaded = go_on()
        check_loaded(
            gain_names(model),
            info.missing_keys,
            (name for name, *_ in info.mismatched_keys),
            folded=len(manifest.tensors),
            unused=len(info.unexpected_keys),
            folder=folder,
        )
        if not manifest.tensor_lock:
            for norm in norms:
                norm.lock()
        for name, norm in _gains(model).items():
            norm.__dict__["source"] = manifest.tensors.get(name)
        release(model.config)
        return info, offloaded

    return load_pretrained_model


def _load_raw_gains(model: Any, load: Callable[[], Any]) -> Any:
    """`load()` into `model`; where it finds a raw w, [H], for a folded norm, that w is folded.

    An adapter with trained norms that was made on the original has them. Their names are known only
    after transformers has renamed them, which is when it finds that the shapes differ.
    """
    info, offloaded = load()
    gains = _gains(model)
    raw = [
        gains[name]
        for name, given, expected in info.mismatched_keys
        if name in gains and (*given, 1) == tuple(expected)
    ]
    if not raw:
        return info, offloaded
    for norm in raw:
        norm.unlock()
    info, offloaded = load()
    for norm in raw:
        norm.fold_raw()
    return info, offloaded


def gain_names(model: Any) -> list[str]:
    """Parameter names of the folded norms of `model`."""
    return list(_gains(model))


def _gains(model: Any) -> dict[str, FoldedNorm]:
    """The folded norms of `model` by the names of their parameters."""
    return {
        f"{name}.{module.gain_name}" if name else module.gain_name: module
        for name, module in model.named_modules()
        if isinstance(module, FoldedNorm)
    }


def _folded_folder(files: list[str] | None, load_config: Any) -> Path | None:
    """Where the manifest of a folded checkpoint lies, or None for any other checkpoint."""
    if not files or not str(files[0]).endswith(".safetensors"):
        return None
    folder = Path(files[0]).parent
    if not (folder / MANIFEST).is_file():
        if not _says_folded(_fetch(folder, CONFIG, load_config)):
            return None
        if _fetch(folder, MANIFEST, load_config) is None:
            raise CheckpointError(
                f"{folder} has lost its {MANIFEST}; fetch it, or fold the original again"
            )
    return folder


def _fetch(folder: Path, name: str, load_config: Any) -> Path | None:
    """A file beside the weights; from the Hub only where the weights come from there."""
    if (folder / name).is_file():
        return folder / name
    source = load_config.pretrained_model_name_or_path
    if source is None or os.path.isdir(source):
        return None
    options = {**load_config.download_kwargs, "_raise_exceptions_for_missing_entries": False}
    found = cached_file(source, name, **options)
    return Path(found) if found else None


def _says_folded(config: Path | None) -> bool:
    if config is None:
        return False
    try:
        return bool(json.loads(config.read_bytes()).get("model_type") == MODEL_TYPE)
    except (ValueError, AttributeError):
        return False  # whoever reads it next says what is wrong with it


def _wrap_save(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        release(self.config)  # of a model made from the config alone: its weights are its own
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
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < MINIMUM:
        raise HostError(
            f"transformers {transformers.__version__} is too old for folded checkpoints; "
            f"pip install --upgrade 'transformers>={MINIMUM[0]}.{MINIMUM[1]}'"
        )
    try:
        get_config_dict = PreTrainedConfig.__dict__["get_config_dict"].__func__
        load_pretrained_model = PreTrainedModel.__dict__["_load_pretrained_model"].__func__
        parameters = list(inspect.signature(load_pretrained_model).parameters)
    except (KeyError, AttributeError, ValueError):
        parameters = []
    if parameters[:4] != ["model", "state_dict", "checkpoint_files", "load_config"]:
        raise HostError(
            f"transformers {transformers.__version__} loads models in a way this gemma-fold does "
            "not know; upgrade gemma-fold, or install an earlier transformers"
        )
    PreTrainedConfig.get_config_dict = classmethod(_wrap_get_config_dict(get_config_dict))
    PreTrainedModel._load_pretrained_model = staticmethod(_wrap_load(load_pretrained_model))
    PreTrainedModel.save_pretrained = _wrap_save(PreTrainedModel.save_pretrained)
    keep_lent_configs_off_disk()
    _installed = True
