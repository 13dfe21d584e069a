"""Every way a weight gets into a running SGLang model, and the gains in step with it.

`load_weights` of a folded model takes folded checkpoints, raw ones and single tensors of both: each
gamma becomes the fp32 w that it was made of on its way in, from which the norms make their gain
again, and which suits the loaders of families whose norms gemma-fold does not know. That covers
disk, distributed, tensor, flattened and IPC updates. Loaders that copy into parameters instead are
followed: their norms are brought in step when they are done.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma_fold.engines.checks import folded_block, lock_problem, lost_gammas
from gemma_fold.engines.mode import Mode, requested_mode
from gemma_fold.engines.sglang.norms import (
    GAMMA,
    GainedNorm,
    NativeNorm,
    adopt,
    gained_norms,
    share_workspace,
    zero_centred_norms,
)
from gemma_fold.engines.weights import folded_tensors, original_weight
from gemma_fold.errors import CheckpointError, GemmaFoldError, UnsupportedModelError
from gemma_fold.format.manifest import FoldedTensor, read_manifest
from gemma_fold.format.names import MANIFEST, MODEL_TYPE

_STATE = "gemma_fold_weights"
_log = logging.getLogger("sglang.gemma_fold")


@dataclass(slots=True)
class FoldedWeights:
    """What a folded model's manifest lists, and what came in so far.

    Attributes:
        source: of the checkpoint, for messages: a folder, a Hub id or the address of a store.
        tensors: its folded tensors by name.
        seen: names of those that were loaded as gammas.
    """

    source: str
    tensors: Mapping[str, FoldedTensor]
    seen: set[str] = field(default_factory=set)

    def unfold(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """`weights` with every gamma of the manifest, fp32 [H, 1], as fp32 w, [H]."""
        for name, tensor in weights:
            folded = self.tensors.get(name)
            if folded is not None and tensor.dim() == 2 and tensor.dtype == torch.float32:
                self.seen.add(name)
                weight = original_weight(tensor.view(-1), folded)
                setattr(weight, GAMMA, tensor.view(-1))
                yield name, weight
            else:
                yield name, tensor


def choose_mode(folded: bool) -> Mode | None:
    """The mode of a model about to be built, or None if it is left alone.

    A folded one runs stock unless `GEMMA_FOLD` asks for native: on GPUs native mode has not been
    measured in SGLang. An original is left alone unless it asks for native: it is then folded as
    it loads.

    Raises:
        UsageError: the variable has another value.
    """
    wanted = requested_mode()
    if folded:
        return wanted or "stock"
    return wanted if wanted == "native" else None


def norm_class(norm: nn.Module, mode: Mode) -> type[GainedNorm]:
    """What `norm` becomes. One whose class has a forward of its own keeps SGLang's kernels."""
    from gemma_fold.engines.sglang.all_reduce import StockNorm

    replaced = type(norm).__module__ != "sglang.srt.layers.layernorm"
    return StockNorm if mode == "stock" or replaced else NativeNorm


def initialize(original: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Around SGLang's `_initialize_model`: adopt the norms of a model that is or will be folded."""
    model_config = kwargs["model_config"] if "model_config" in kwargs else args[0]
    block = folded_block(model_config.hf_config)
    folded = _read_folded(model_config, block) if block is not None else None
    model = original(*args, **kwargs)
    mode = choose_mode(folded is not None)
    if mode is None:
        return model
    norms = zero_centred_norms(model)
    for _, norm in norms:
        adopt(norm, norm_class(norm, mode))
    _log.info(
        "gemma-fold: SGLang %s: %d norms folded, %s mode", version("sglang"), len(norms), mode
    )
    if mode == "native":
        from gemma_fold.engines.sglang.layers import pair_norms

        if not pair_norms(model):
            share_workspace(model, model_config.hidden_size)
    if folded is not None:
        _accept_gammas(model, folded)
    return model


def follow_loader(loader: Any, *args: Any, **kwargs: Any) -> Any:
    """After `get_model_loader`: check and follow the model that the loader will load."""
    load_model = loader.load_model

    @wraps(load_model)
    def load_then_follow(*args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = load_model(*args, **kwargs)
        follow(model)
        check_complete(model)
        return model

    loader.load_model = load_then_follow
    return loader


def load_direct(
    original: Callable[..., None], model: nn.Module, named_tensors: list[tuple[str, Tensor]]
) -> None:
    """Around the update that copies tensors into parameters: norms take theirs with the gain."""
    norms = {f"{name}.weight": norm for name, norm in gained_norms(model)}
    for name, tensor in named_tensors:
        if name in norms:
            norms[name].load_gain(norms[name].weight, tensor)
    original(model, [(name, tensor) for name, tensor in named_tensors if name not in norms])


def update_from_disk(
    original: Callable[..., tuple[bool, str]],
    updater: Any,
    model_path: str,
    *args: Any,
    **kwargs: Any,
) -> tuple[bool, str]:
    """Around the update from disk: refuse a folded checkpoint that this model cannot take.

    SGLang would read its gammas as raw weights. If their shape stops it, it goes back to what
    was there by loading the same path again, and the server ends.
    """
    try:
        block = _folded_block(model_path)
    except GemmaFoldError as error:  # a damaged config
        return False, str(error)
    if block is None:
        return original(updater, model_path, *args, **kwargs)
    if problem := lock_problem(block, model_path, "SGLang"):
        return False, problem
    if getattr(updater.get_model(), _STATE, None) is None:
        return False, (
            f"{model_path} is a folded checkpoint, and the model being served was loaded from an "
            "original one; update from an original, or start the server with a folded checkpoint"
        )
    return original(updater, model_path, *args, **kwargs)


def follow_update(result: Any, updater: Any, *args: Any, **kwargs: Any) -> None:
    """After an update from tensors, which a custom loader may have written anywhere."""
    follow(updater.get_model())


def follow(model: nn.Module) -> None:
    """Bring every gain of `model` in step with its weight."""
    for _, norm in gained_norms(model):
        norm.follow_weight()


def check_complete(model: nn.Module) -> None:
    """CheckpointError unless a folded model that loaded gammas loaded all of them.

    Loaders that never called `load_weights` (sharded state, dummy, another instance) saw none.
    """
    state: FoldedWeights | None = getattr(model, _STATE, None)
    if state is None or not state.seen:
        return
    norms = dict(gained_norms(model))
    lost = [name for name, norm in norms.items() if not norm.given]
    missing = sorted(state.tensors.keys() - state.seen)
    for names, count in ((missing, len(state.tensors)), (lost, len(norms))):
        if names:
            raise CheckpointError(lost_gammas(state.source, names, count))


def _accept_gammas(model: nn.Module, state: FoldedWeights) -> None:
    load_weights: Callable[..., Any] = model.load_weights  # type: ignore[assignment]

    @wraps(load_weights)
    def load_unfolded(weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        unfolded = state.unfold(weights)
        return load_weights(
            list(unfolded) if isinstance(weights, list) else unfolded, *args, **kwargs
        )

    # On the instance: the class serves models that are not folded, too.
    model.__dict__["load_weights"] = load_unfolded
    model.__dict__[_STATE] = state


def _folded_block(name: str) -> Mapping[str, Any] | None:
    """The gemma_fold block of a checkpoint's config; None if it has none to read."""
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError):
        return None  # SGLang reports what is wrong with it, or reads weights without a config
    block: Mapping[str, Any] | None = config.get(MODEL_TYPE)
    return block


def _read_folded(model_config: Any, block: Mapping[str, Any]) -> FoldedWeights:
    name = os.fspath(model_config.model_path)
    if problem := lock_problem(block, name, "SGLang"):
        raise UnsupportedModelError(problem)
    remote = getattr(model_config, "model_weights", None)
    if remote is not None:
        return FoldedWeights(str(remote), _remote_manifest(str(remote)))
    return FoldedWeights(name, folded_tensors(name, getattr(model_config, "revision", None)))


def _remote_manifest(url: str) -> Mapping[str, FoldedTensor]:
    """From a remote store, of which SGLang has fetched the config alone."""
    from sglang.srt.connector import create_remote_connector

    with create_remote_connector(url) as client:
        client.pull_files(allow_pattern=[MANIFEST])
        return read_manifest(Path(client.get_local_dir())).tensors
