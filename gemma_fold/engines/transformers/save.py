"""Complete what transformers' `save_pretrained` wrote for a folded model to format 1.

transformers writes the weights, with each gamma as fp32 [H, 1], and the original config. Added
here are the manifest and the config lock. The manifest's source is the checkpoint that the same
model would have saved unfolded, so `gemma-fold unfold` and `verify` work on the result.

All of it is written into a work folder first. If the target is absent or empty, it appears in
one step; otherwise the files replace those of the model that was there, and until the last one is
in place the folder has no config.json, without which nothing loads it. What a kill cuts off, the
next run for the same folder finishes.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from inspect import BoundArguments
from pathlib import Path
from typing import Any

import torch

from gemma_fold.checkpoint.digest import digest_parts, digest_text, tensor_parts
from gemma_fold.checkpoint.header import with_length
from gemma_fold.checkpoint.layout import Layout, replace_tensors
from gemma_fold.checkpoint.listing import below, is_empty_or_absent, is_there
from gemma_fold.checkpoint.names import unsafe_reason
from gemma_fold.checkpoint.source import (
    CONFIG,
    SKIPPED_DIRECTORIES,
    Checkpoint,
    Origin,
    WeightFile,
    open_checkpoint,
    read_tensor,
    resized_index,
)
from gemma_fold.checkpoint.staging import open_staging, settle
from gemma_fold.engines.transformers.norms import FoldedNorm
from gemma_fold.engines.transformers.weights import refuse_parametrized, weights_dtype
from gemma_fold.errors import CheckpointError, UnsupportedModelError, UsageError
from gemma_fold.format.arithmetic import decode, fold, unfold
from gemma_fold.format.manifest import FoldedTensor, SourceFile, folded_config, manifest_of
from gemma_fold.format.names import MANIFEST, SAVED
from gemma_fold.rules import TensorRule, classify

_STORAGE = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
#: What a save of any sharding leaves at the top of its folder.
_OF_THE_MODEL = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|config\.json|gemma_fold\.json"
)
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

    Args:
        save_pretrained: transformers' own.
        model: with folded norms.
        folder: where it is saved.
        arguments: of the call of `save_pretrained`.

    Raises:
        UsageError: an option that format 1 has no place for.
        UnsupportedModelError: what was written cannot be completed; every loader refuses it then.
        CheckpointError: so it cannot, because it is not what was expected.
    """
    given = {**arguments.arguments, **arguments.arguments.get("kwargs", {})}
    for option, advice in _UNSUPPORTED.items():
        if given.get(option):
            raise UsageError(f"a folded model cannot be saved with {option}; {advice}")
    if not given.get("is_main_process", True):
        save_pretrained(*arguments.args, **arguments.kwargs)
        return
    refuse_parametrized(one for one in model.modules() if isinstance(one, FoldedNorm))
    names = _names_on_disk(model, original_names=given.get("save_original_format", True))
    if is_there(folder) and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; name one")
    notes = settle(folder).notes
    with open_staging(
        folder, "save", size=0, resume=False, restart=True, again="save again"
    ) as staging:
        arguments.arguments["save_directory"] = str(staging.folder.path)
        save_pretrained(*arguments.args, **arguments.kwargs)
        if not (staging.folder.path / CONFIG).is_file():
            raise CheckpointError(f"transformers wrote no {CONFIG} for {folder}; nothing was saved")
        kept = _kept_files(folder, staging.folder.path)
        _complete(staging.folder.path, folder, kept, names, weights_dtype(model))
        if is_empty_or_absent(folder):
            staging.folder.sync(files=True)
        else:
            staging.merge(lambda name: _OF_THE_MODEL.fullmatch(name) is not None)
    for note in (*notes, *staging.notes):
        warnings.warn(note, stacklevel=3)


def _kept_files(folder: Path, new: Path) -> dict[str, int]:
    """Sizes of the files in `folder` that are neither the old model's nor written anew."""
    if is_empty_or_absent(folder):
        return {}
    return {
        name: (folder / name).stat().st_size
        for name, _ in below(folder)
        if unsafe_reason(name) is None
        and (folder / name).is_file()
        and SKIPPED_DIRECTORIES.isdisjoint(name.split("/"))
        and not _OF_THE_MODEL.fullmatch(name)
        and not (new / name).exists()
    }


def _names_on_disk(model: Any, *, original_names: bool) -> list[str]:
    """What the gammas are called in the saved files, after transformers' renaming."""
    from transformers.core_model_loading import revert_weight_conversion

    gains = {
        f"{name}.{module.gain_name}": torch.empty(module.gain.shape, device="meta")
        for name, module in model.named_modules()
        if isinstance(module, FoldedNorm)
    }
    return list(revert_weight_conversion(model, gains) if original_names else gains)


def _complete(
    folder: Path, final: Path, kept: Mapping[str, int], names: list[str], dtype: torch.dtype
) -> None:
    """Write manifest and config lock into `folder`, soon `final` beside the files `kept`."""
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
        files[file.name] = _source_file(file, plain, here)
        growth += file.state.size - file.header.data_start - (plain.size - plain.data_start)
    config = json.dumps(base, ensure_ascii=False, indent=2) + "\n"
    sizes = {name: state.size for name, state in checkpoint.others.items()} | dict(kept)
    files |= {name: SourceFile(name, size) for name, size in sizes.items()}
    locked = folded_config(base, dtype=base["dtype"], tensors=len(tensors), tensor_lock=True)
    manifest = manifest_of(
        checkpoint,
        (config.encode(), resized_index(checkpoint, -growth)),
        (locked, checkpoint.index_raw),
        files,
        origin=Origin(final.absolute().name.encode("utf-8", "backslashreplace").decode()),
        model_type=str(base.get("model_type")),
        tensor_lock=True,
        tensors=tensors,
        made_by=SAVED,
    )
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    (folder / CONFIG).write_bytes(locked)


def _source_file(file: WeightFile, plain: Layout, here: Mapping[str, FoldedTensor]) -> SourceFile:
    """The manifest's entry for a saved weight file, with the digests of what is not folded."""
    with open(file.path, "rb", buffering=0) as stream:
        tensors = digest_parts(stream.fileno(), tensor_parts(file.header, here))
    return SourceFile(
        file.name,
        plain.size,
        header=plain.header.decode(),
        folded_header=digest_text(with_length(file.header.raw)),
        tensors=tensors,
    )


def _rules(
    checkpoint: Checkpoint, config: Mapping[str, Any], names: list[str]
) -> dict[str, TensorRule]:
    """The rule of each saved gamma; UnsupportedModelError if rules and model disagree."""
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
        blake3=digest_text(raw),
    )
