"""Decide everything about a conversion before a single byte is written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from gemma_fold.checkpoint.copy import hole_bytes
from gemma_fold.checkpoint.digest import digest_chunks, digest_text, tensor_parts, whole
from gemma_fold.checkpoint.header import TensorEntry, with_length
from gemma_fold.checkpoint.hub import cached_sha256
from gemma_fold.checkpoint.layout import Layout, replace_tensors
from gemma_fold.checkpoint.listing import below
from gemma_fold.checkpoint.source import CONFIG, Checkpoint, WeightFile, read_tensor, resized_index
from gemma_fold.errors import AlreadyFoldedError, CheckpointError
from gemma_fold.format.arithmetic import count_non_finite, find_exceptions, fold, is_foldable_dtype
from gemma_fold.format.manifest import (
    FoldedTensor,
    Manifest,
    SourceFile,
    folded_config,
    manifest_of,
    read_manifest,
)
from gemma_fold.format.names import CONVERTED, MANIFEST
from gemma_fold.rules import Classification, TensorRule, classify

_OTHER_WEIGHTS = re.compile(r"(pytorch_model|model|consolidated)[^/]*\.(bin|pt|pth)|[^/]*\.gguf")
_NO_DIGEST = "0" * 64
_FILE = whole(0)
_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """What becomes of one weight file; without a layout it is copied as it is."""

    file: WeightFile
    layout: Layout | None
    gammas: Mapping[str, bytes]

    @property
    def size(self) -> int:
        """Bytes of the file that will be written."""
        return self.layout.size if self.layout else self.file.state.size


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole conversion: every file's content is decided, nothing is written yet."""

    checkpoint: Checkpoint
    classification: Classification
    manifest: Manifest
    config: bytes
    index: bytes | None
    weights: tuple[WeightPlan, ...]
    warnings: tuple[str, ...]

    def size(self, *, digests_taken: bool) -> int:
        """Bytes that the folded checkpoint will occupy."""
        manifest = self.proven_manifest(self._no_digests() if digests_taken else {})
        return sum(self._sizes().values()) + sum(map(len, manifest.chunks()))

    def holes(self) -> int:
        """Bytes of `size` that are holes in the source's files, and stay holes."""
        return sum(hole_bytes(item.file.path, item.file.state.size) for item in self.weights)

    def _sizes(self) -> dict[str, int]:
        """Of every file but the manifest."""
        sizes = {name: state.size for name, state in self.checkpoint.others.items()}
        sizes |= {item.file.name: item.size for item in self.weights}
        if self.index is not None and self.checkpoint.index_name is not None:
            sizes[self.checkpoint.index_name] = len(self.index)
        return sizes | {CONFIG: len(self.config)}

    def _no_digests(self) -> dict[str, dict[str, str]]:
        """Digests of the right length for everything that will get one."""
        digests = {
            item.file.name: {
                part.name: _NO_DIGEST
                for part in (tensor_parts(item.file.header, item.gammas) if item.layout else _FILE)
            }
            for item in self.weights
        }
        return digests | {name: {"": _NO_DIGEST} for name in self.checkpoint.others}

    def digest(self, *, digests_taken: bool, by_commit: bool = False) -> str:
        """Changes whenever anything about the source, the result or this version changes.

        `by_commit`: what the source is, the commit in the manifest says, and not its files here.
        """
        if by_commit:
            return digest_chunks(chain(self.manifest.chunks(), (repr(digests_taken).encode(),)))
        root = os.fsencode(os.path.realpath(self.checkpoint.root))
        states = {item.file.name: item.file.state for item in self.weights}
        states.update(self.checkpoint.others)
        read = repr((sorted(states.items()), digests_taken)).encode()
        return digest_chunks(chain(self.manifest.chunks(), (root, read)))

    def files(self) -> frozenset[str]:
        """Every file of the folded checkpoint."""
        return frozenset({*self.manifest.files, MANIFEST})

    def is_result(self, folder: Path) -> bool:
        """Whether `folder` is what this plan makes: by its manifest, and the sizes of the rest."""
        if not folder.is_dir():
            return False
        sizes = {name: status.st_size for name, status in below(folder)}
        if any(sizes.get(name) != size for name, size in self._sizes().items()):
            return False
        try:
            found = read_manifest(folder)
        except CheckpointError:
            return False
        files = {name: self._undigested(name, file) for name, file in found.files.items()}
        return replace(found, files=files) == self.manifest

    def _undigested(self, name: str, found: SourceFile) -> SourceFile:
        """A file's entry without what is known only after copying it."""
        planned = self.manifest.files.get(name)
        known = found.blake3 if planned is None else planned.blake3
        return replace(found, folded_header=None, tensors=None, blake3=known)

    def proven_manifest(self, digests: Mapping[str, Mapping[str, str]]) -> Manifest:
        """The manifest with the digests that were taken, by file and part."""
        files = dict(self.manifest.files)
        layouts = {item.file.name: item.layout for item in self.weights}
        for name, parts in digests.items():
            file = files[name]
            layout = layouts.get(name)
            if layout is not None:
                header = digest_text(with_length(layout.header))
                files[name] = replace(file, folded_header=header, tensors=parts)
            else:
                files[name] = replace(file, blake3=parts[""])
        return replace(self.manifest, files=files)


def plan_conversion(checkpoint: Checkpoint, *, tensor_lock: bool = True) -> Plan:
    """Classify every tensor, fold the norms in memory and lay out the files.

    Reads the norm weights and nothing else of the payload.

    Raises:
        UnsupportedModelError, NothingToFoldError: no rule covers this model.
        AlreadyFoldedError: the norms are folded already.
        CheckpointError: it cannot be folded exactly.
    """
    if MANIFEST in checkpoint.others:
        raise AlreadyFoldedError(
            f"{checkpoint.root} has a {MANIFEST}, so its norms are folded already; "
            "use it as it is, or `gemma-fold unfold` it"
        )
    classification = classify(checkpoint.config, checkpoint.shapes())
    classification.require_foldable()
    rules = classification.zero_centred()
    weights, tensors = [], dict[str, FoldedTensor]()
    for file in checkpoint.weights:
        item, folded = _plan_file(file, rules, tensor_lock=tensor_lock)
        weights.append(item)
        tensors.update(folded)
    growth = sum(
        len(gamma) - _extent(item.file, name)
        for item in weights
        for name, gamma in item.gammas.items()
    )
    config = folded_config(
        checkpoint.config,
        dtype=_weights_dtype(checkpoint, rules),
        tensors=len(tensors),
        tensor_lock=tensor_lock,
    )
    index = resized_index(checkpoint, growth)
    manifest = manifest_of(
        checkpoint,
        (checkpoint.config_raw, checkpoint.index_raw),
        (config, index),
        _files(checkpoint, weights),
        origin=checkpoint.origin,
        model_type=classification.model_type,
        tensor_lock=tensor_lock,
        tensors=tensors,
        made_by=CONVERTED,
    )
    return Plan(
        checkpoint=checkpoint,
        classification=classification,
        manifest=manifest,
        config=config,
        index=index,
        weights=tuple(weights),
        warnings=tuple(_warnings(checkpoint, classification, tensors)),
    )


def _plan_file(
    file: WeightFile, rules: Mapping[str, TensorRule], *, tensor_lock: bool
) -> tuple[WeightPlan, dict[str, FoldedTensor]]:
    chosen = [tensor for name, tensor in file.header.tensors.items() if name in rules]
    if not chosen:
        return WeightPlan(file, None, {}), {}
    gammas, folded, forms = {}, {}, {}
    for tensor in chosen:
        _check_can_fold(tensor, file)
        raw = read_tensor(file, tensor.name)
        gammas[tensor.name], folded[tensor.name] = _fold_tensor(
            tensor, raw, rules[tensor.name], file.name
        )
        forms[tensor.name] = ("F32", (*tensor.shape, 1) if tensor_lock else tensor.shape)
    return WeightPlan(file, replace_tensors(file.header, forms), gammas), folded


def _check_can_fold(tensor: TensorEntry, file: WeightFile) -> None:
    where = f"norm {tensor.name} in {file.path}"
    if len(tensor.shape) == 2 and tensor.shape[1] == 1 and tensor.dtype == "F32":
        raise AlreadyFoldedError(
            f"{where} has the shape [H, 1] of a folded gamma; use this checkpoint as it is"
        )
    if len(tensor.shape) != 1:
        raise CheckpointError(
            f"{where} has shape {list(tensor.shape)}, not one dimension; "
            "fold the checkpoint it was made from"
        )
    if not is_foldable_dtype(tensor.dtype):
        raise CheckpointError(
            f"{where} is stored as {tensor.dtype}, not BF16, F16 or F32; "
            "fold the checkpoint it was quantized from"
        )


def _fold_tensor(
    tensor: TensorEntry, raw: bytes, rule: TensorRule, file: str
) -> tuple[bytes, FoldedTensor]:
    assert rule.fold is not None  # a zero-centred rule always carries its arithmetic
    gamma = fold(raw, tensor.dtype, rule.fold)
    return gamma.tobytes(), FoldedTensor(
        name=tensor.name,
        file=file,
        family=rule.family,
        pattern=rule.pattern,
        fold=rule.fold,
        shape=tensor.shape,
        dtype=tensor.dtype,
        blake3=digest_text(raw),
        non_finite=count_non_finite(raw, tensor.dtype),
        exceptions=find_exceptions(raw, tensor.dtype, gamma, rule.fold),
    )


def _extent(file: WeightFile, name: str) -> int:
    tensor = file.header.tensors[name]
    return tensor.end - tensor.start


def _weights_dtype(checkpoint: Checkpoint, rules: Mapping[str, TensorRule]) -> str | None:
    """The config's own dtype, else that of most weight bytes other than the folded norms."""
    config = checkpoint.config
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            named = part.get("dtype") or part.get("torch_dtype")
            if isinstance(named, str):
                return named
    sizes: dict[str, int] = {}
    for name, (_, tensor) in checkpoint.tensors().items():
        if tensor.dtype in _TORCH_DTYPES and name not in rules:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.end - tensor.start
    return _TORCH_DTYPES[max(sizes, key=lambda dtype: sizes[dtype])] if sizes else None


def _files(checkpoint: Checkpoint, weights: list[WeightPlan]) -> dict[str, SourceFile]:
    """The manifest's entries for weights and other files, without digests."""
    files = {}
    for item in weights:
        header = item.file.header.raw.decode() if item.layout else None
        name, size = item.file.name, item.file.state.size
        files[name] = SourceFile(name, size, _sha256(checkpoint, name), header=header)
    for name, state in checkpoint.others.items():
        files[name] = SourceFile(name, state.size, _sha256(checkpoint, name))
    return files


def _sha256(checkpoint: Checkpoint, name: str) -> str | None:
    return checkpoint.sha256.get(name) or cached_sha256(checkpoint.root / name)


def _warnings(
    checkpoint: Checkpoint,
    classification: Classification,
    tensors: Mapping[str, FoldedTensor],
) -> list[str]:
    warnings = list(classification.notes)
    bad = [tensor.name for tensor in tensors.values() if tensor.non_finite]
    if bad:
        warnings.append(f"NaN or infinity in {len(bad)} norms ({bad[0]}, ...): folded as they are")
    stored = {tensor.dtype for tensor in tensors.values()}
    for dtype, name, compute in (
        ("F32", "float32", "bfloat16 or float16"),
        ("F16", "float16", "bfloat16"),
    ):
        if dtype in stored:
            warnings.append(
                f"{name} norms: at {compute} compute results differ, for there the original "
                "rounds w before it adds; at any other they are identical"
            )
    for name in checkpoint.others:
        if _OTHER_WEIGHTS.fullmatch(name):
            warnings.append(f"{name} is copied as it is: weights in it are not folded")
        elif name.endswith(".safetensors"):
            warnings.append(f"{name} lies in a subfolder and is copied as it is, not folded")
    warnings.extend(f"{name} is left out" for name in checkpoint.skipped)
    return warnings
