"""Complete what transformers' `save_pretrained` wrote for a folded model to format 1.

transformers writes the weights, with each gamma as fp32 [H, 1], and the original config. Added
here are the manifest and the config lock. The manifest's source is the checkpoint that the same
model would have saved unfolded, so `gemma-fold unfold` and `verify` work on the result.

Until the last file is in place, the folder holds the original config over locked tensors, which
every loader refuses.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from inspect import BoundArguments
from pathlib import Path
from typing import Any

import torch

from gemma_fold.checkpoint.layout import replace_tensors
from gemma_fold.checkpoint.source import (
    CONFIG,
    MANIFEST,
    Checkpoint,
    Origin,
    WeightFile,
    open_checkpoint,
    read_tensor,
    resized_index,
)
from gemma_fold.errors import CheckpointError, UnsupportedModelError, UsageError
from gemma_fold.fold import decode, fold, unfold
from gemma_fold.manifest import FoldedTensor, Manifest, SourceFile, folded_config
from gemma_fold.rules import TensorRule, classify
from gemma_fold.runtime.fold_model import weights_dtype
from gemma_fold.runtime.norm import FoldedNorm

_STORAGE = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_UNSUPPORTED = {
    "push_to_hub": "save first, then upload the folder",
    "distributed_checkpoint": "save without it",
    "variant": "save without it",
}


def save_folded(
    save_pretrained: Callable[..., Any], model: Any, folder: Path, arguments: BoundArguments
) -> None:
    """Run transformers' `save_pretrained` and complete its folder to format 1.

    A gamma that training moved to a value no fp32 w folds to is rounded to the nearest that one
    does, by a last bit of w: the format promises that every gamma can be unfolded.

    Raises UsageError for options format 1 has no place for, UnsupportedModelError or
    CheckpointError where what was written cannot be completed; every loader refuses it then.
    """
    given = {**arguments.arguments, **arguments.arguments.get("kwargs", {})}
    for option, advice in _UNSUPPORTED.items():
        if given.get(option):
            raise UsageError(f"a folded model cannot be saved with {option}; {advice}")
    # The last two are what a save that was killed left: no file of the model.
    for path in (folder / MANIFEST, _temporary(folder / MANIFEST), _temporary(folder / CONFIG)):
        path.unlink(missing_ok=True)
    save_pretrained(*arguments.args, **arguments.kwargs)
    if given.get("is_main_process", True) and (folder / CONFIG).is_file():
        names = _names_on_disk(model, original_names=given.get("save_original_format", True))
        _complete(folder, names, weights_dtype(model))


def _names_on_disk(model: Any, *, original_names: bool) -> list[str]:
    """What the gammas are called in the saved files, after transformers' renaming."""
    from transformers.core_model_loading import revert_weight_conversion

    gains = {
        f"{name}.{module.gain_name}": torch.empty(module.gain.shape, device="meta")
        for name, module in model.named_modules()
        if isinstance(module, FoldedNorm)
    }
    return list(revert_weight_conversion(model, gains) if original_names else gains)


def _complete(folder: Path, names: list[str], dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(folder)
    base = {**checkpoint.config, "dtype": str(dtype).removeprefix("torch.")}
    rules = _rules(checkpoint, base, names)
    storage = _STORAGE.get(dtype, "F32")
    tensors: dict[str, FoldedTensor] = {}
    files: dict[str, SourceFile] = {}
    growth = 0
    for file in checkpoint.weights:
        here = {n: _describe(file, n, rules[n], storage) for n in file.header.tensors if n in rules}
        tensors |= here
        plain = replace_tensors(file.header, {n: (t.dtype, t.shape) for n, t in here.items()})
        files[file.name] = SourceFile(file.name, plain.size, header=plain.header.decode())
        growth += file.state.size - file.header.data_start - (plain.size - plain.data_start)
    config = json.dumps(base, ensure_ascii=False, indent=2) + "\n"
    plain_index = resized_index(checkpoint, -growth)
    index = None if plain_index is None else plain_index.decode()
    for name, text in ((CONFIG, config), (checkpoint.index_name, index)):
        if name is not None and text is not None:
            raw = text.encode()
            files[name] = SourceFile(name, len(raw), hashlib.sha256(raw).hexdigest())
    files |= {name: SourceFile(name, state.size) for name, state in checkpoint.others.items()}
    manifest = Manifest(
        origin=Origin(folder.absolute().name),
        model_type=str(base.get("model_type")),
        tensor_lock=True,
        config=config,
        index=index,
        index_name=checkpoint.index_name,
        files=files,
        directories=checkpoint.directories,
        tensors=tensors,
    )
    _replace(folder / MANIFEST, manifest.to_bytes())
    locked = folded_config(base, dtype=base["dtype"], tensors=len(tensors), tensor_lock=True)
    _replace(folder / CONFIG, locked)


def _rules(
    checkpoint: Checkpoint, config: Mapping[str, Any], names: list[str]
) -> dict[str, TensorRule]:
    """The rule of each saved gamma; UnsupportedModelError where rules and model disagree."""
    shapes = checkpoint.shapes()
    for name in names:
        shape = shapes.get(name, ())
        if len(shape) != 2 or shape[1] != 1:
            raise CheckpointError(
                f"{checkpoint.root} was not saved as expected: {name} has shape {list(shape)}; "
                "save without a state_dict of your own"
            )
    gains = set(names)
    plain = {name: shape[:1] if name in gains else shape for name, shape in shapes.items()}
    rules = classify(config, plain).zero_centred()
    for name in sorted(set(rules) ^ gains):
        raise UnsupportedModelError(
            f"{name} is {'zero-centred' if name in rules else 'plain'} by the rules but "
            f"{'plain' if name in rules else 'folded'} in the model, so {checkpoint.root} is not a "
            "usable checkpoint; call gemma_fold.unfold_model(model) and save again"
        )
    return rules


def _describe(file: WeightFile, name: str, rule: TensorRule, storage: str) -> FoldedTensor:
    """The manifest's entry for a saved gamma, which becomes the fold of the w it names."""
    assert rule.fold is not None
    entry = file.header.tensors[name]
    if entry.dtype != "F32":
        raise CheckpointError(
            f"{name} in {file.path} was saved as {entry.dtype}, which loses bits of gamma; "
            "save the model itself, not a cast state_dict"
        )
    gamma = decode(read_tensor(file, name), "F32")
    dtype = storage
    raw = unfold(gamma, dtype, rule.fold)
    if fold(raw, dtype, rule.fold).tobytes() != gamma.tobytes():
        dtype = "F32"
        raw = unfold(gamma, dtype, rule.fold)
        rounded = fold(raw, dtype, rule.fold).tobytes()
        if rounded != gamma.tobytes():
            with open(file.path, "r+b") as stream:
                stream.seek(file.header.data_start + entry.start)
                stream.write(rounded)
    return FoldedTensor(
        name=name,
        file=file.name,
        family=rule.family,
        pattern=rule.pattern,
        fold=rule.fold,
        shape=entry.shape[:1],
        dtype=dtype,
        sha256=hashlib.sha256(raw).hexdigest(),
    )


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _replace(path: Path, content: bytes) -> None:
    temporary = _temporary(path)
    temporary.write_bytes(content)
    os.replace(temporary, path)
