"""Whether a folder is the folded checkpoint it says it is, and whether a model took all of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gemma_fold.checkpoint.source import CONFIG
from gemma_fold.errors import CheckpointError
from gemma_fold.format.manifest import unwrap_config
from gemma_fold.format.names import MANIFEST, MODEL_TYPE


def native_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The original config inside a folded `config.json`; any other config comes back as it is.

    The dtype is filled in where the original names none, because loaders would then take that of
    the fp32 gammas. Raises CheckpointError for a later format or a damaged config.
    """
    if config.get("model_type") != MODEL_TYPE:
        return config
    base = unwrap_config(config, Path(where) / CONFIG)
    # Loaders add keys of their own, such as the commit of a download.
    native = {**base, **{key: value for key, value in config.items() if key.startswith("_")}}
    if native.get("dtype") is None and native.get("torch_dtype") is None and "dtype" in config:
        native["dtype"] = config["dtype"]
    return native


def check_loaded(
    gains: Sequence[str],
    missing: Iterable[str],
    mismatched: Iterable[str],
    *,
    folded: int,
    unused: int,
    folder: Path,
) -> None:
    """CheckpointError unless every folded norm of the model took its gamma from the checkpoint.

    gains: parameter names of the model's folded norms. missing, mismatched: what the loader says.
    folded: tensors the manifest lists. unused: tensors on disk that this model has no use for.
    """
    lost = sorted(set(gains) & {*missing, *mismatched})
    if lost:
        raise CheckpointError(
            f"{folder} gives no gamma for {lost[0]} ({len(lost)} of {len(gains)} norms); "
            f"the weights and {MANIFEST} belong to another model: fold the original again"
        )
    if len(gains) > folded or (len(gains) < folded and not unused):
        raise CheckpointError(
            f"the model has {len(gains)} zero-centred norms but {folder / MANIFEST} lists "
            f"{folded}; fold the original again with this version of gemma-fold"
        )
