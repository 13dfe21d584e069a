"""The norms of a model folded in memory, and their gammas as a checkpoint is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from gemma_fold.checkpoint.header import read_header
from gemma_fold.engines.checks import check_loaded
from gemma_fold.engines.mode import Report, announce
from gemma_fold.engines.transformers.layers import Fusion, fuse_layers, split_layers
from gemma_fold.engines.transformers.norms import FoldedNorm, gain_name
from gemma_fold.errors import AlreadyFoldedError, NothingToFoldError, UnsupportedModelError
from gemma_fold.format.manifest import read_manifest
from gemma_fold.format.reader import check_gammas
from gemma_fold.rules import NORM_CLASSES, Fold

Model = TypeVar("Model", bound=nn.Module)


def fold_model(model: Model) -> Model:
    """Fold every zero-centred norm of `model` in place, and return it.

    Each norm weight w becomes an fp32 parameter gamma = 1 + w of shape [H, 1] (or the family's own
    offset), and the layers that have fused kernels use them. The outputs keep their bits on CPU.
    Parameters stay the objects they were, so an optimizer made before trains them; one that has
    stepped holds state of shape [H] for them, and stops at its next step.

    Args:
        model: a transformers model with its weights loaded.

    Returns:
        The same object.

    Raises:
        AlreadyFoldedError: it was folded before.
        NothingToFoldError: it has no zero-centred norm.
        UnsupportedModelError: a norm cannot be replaced, for instance in an offloaded model.
    """
    found = zero_centred_norms(model)
    if not found:
        if any(isinstance(module, FoldedNorm) for module in model.modules()):
            raise AlreadyFoldedError("the model is folded already; use it as it is")
        raise NothingToFoldError(
            f"{type(model).__name__} has no zero-centred norm, so there is nothing to fold"
        )
    from gemma_fold.engines.transformers import install

    install()  # it must also save itself as folded
    adopt_norms(model)
    return model


def unfold_model(model: Model) -> Model:
    """Undo :func:`fold_model`, in place: w = gamma - 1 in the dtype of the other weights.

    The outputs keep their bits, unless that dtype rounds w, as in a model loaded in 16 bits from an
    fp32 checkpoint, which becomes what the original is in 16 bits. A w so small that 1 + w was
    rounded comes back as the value that folds to the same gamma, unless the manifest of a loaded
    checkpoint has it; for a checkpoint's own bytes use `gemma-fold unfold` on its folder.

    Args:
        model: a folded transformers model.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: the model is not folded, or is offloaded or sharded.
    """
    norms = [module for module in model.modules() if isinstance(module, FoldedNorm)]
    if not norms:
        raise UnsupportedModelError(f"{type(model).__name__} is not folded; there is nothing to do")
    refuse_parametrized(norms)
    if any(hasattr(norm.gain, "device_mesh") for norm in norms):
        raise UnsupportedModelError(
            "the model is sharded; load its full state dict into a folded model, and unfold that"
        )
    if any("forward" in norm.__dict__ or norm.gain.is_meta for norm in norms):
        raise UnsupportedModelError(
            "the model is offloaded, so its norms are not all in memory; load it without device_map"
        )
    split_layers(model)
    dtype = weights_dtype(model)
    shared = shared_parameters(model)
    for norm in norms:
        norm.restore(dtype, shared=id(norm.gain) in shared)
    return model


def zero_centred_norms(model: nn.Module) -> list[tuple[nn.Module, Fold]]:
    """The zero-centred norms of `model` that are not folded yet, with their arithmetic."""
    found = []
    for module in model.modules():
        fold = _fold_of(module)
        if fold is not None:
            found.append((module, fold))
    return found


def adopt_norms(model: nn.Module, *, locked: bool = True) -> list[FoldedNorm]:
    """Fold the norms that :func:`zero_centred_norms` finds, and fuse the layers that can be.

    What was fused, and why not the rest, is logged.

    Raises:
        UnsupportedModelError: something is not fused and GEMMA_FOLD=require asks for all.
    """
    shared = shared_parameters(model)
    norms = [
        FoldedNorm.adopt(
            m, fold, locked=locked, shared=id(m._parameters.get(gain_name(m))) in shared
        )
        for m, fold in zero_centred_norms(model)
    ]
    announce(report(len(norms), fuse_layers(model)))
    return norms


def refuse_parametrized(norms: Iterable[FoldedNorm]) -> None:
    """UnsupportedModelError if one of them has a parametrization."""
    if any(is_parametrized(norm) for norm in norms):
        raise UnsupportedModelError(
            "a norm has a parametrization; take it off with "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters of `model` that more than one module has."""
    owned = [id(p) for m in model.modules() for p in m._parameters.values() if p is not None]
    return {one for one, owners in Counter(owned).items() if owners > 1}


def report(norms: int, fusion: Fusion) -> Report:
    """What was done to a transformers model, for :func:`announce`."""
    import transformers  # it made the model

    engine = f"transformers {transformers.__version__}"
    return Report(engine, norms, fusion.fused, fusion.sandwiches, fusion.missing)


def weights_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter that is not a folded gain."""
    gains = {id(m.gain) for m in model.modules() if isinstance(m, FoldedNorm)}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in gains:
            return parameter.dtype
    return torch.float32


def _fold_of(module: nn.Module) -> Fold | None:
    cls = type(module)
    # A class of the same name elsewhere may well store plain gamma.
    if not cls.__module__.startswith("transformers."):
        return None
    fold = NORM_CLASSES.get(cls.__name__)
    # The one class that can be set not to add: gamma + float(unit_offset).
    if fold is None or getattr(module, "unit_offset", fold.offset) != fold.offset:
        return None
    return fold


def load_gammas(model: Any, folder: Path, files: Iterable[str], load: Callable[[], Any]) -> Any:
    """Fold the norms of a built `model`, `load()` the weights, and check that it took every gamma.

    Args:
        model: before its weights are read.
        folder: of the folded checkpoint.
        files: its weight files.
        load: transformers' own loading; returns what it found, and more that is passed on.

    Raises:
        CheckpointError: the folder is damaged, or of another model.
        UnsupportedModelError: a norm cannot be folded, or :func:`announce` refuses.
    """
    manifest = read_manifest(folder)
    headers = {Path(file).name: read_header(Path(file)) for file in files}
    check_gammas(manifest, headers, folder)
    norms = adopt_norms(model, locked=manifest.tensor_lock)
    info, offloaded = load()
    check_loaded(
        list(_gains(model)),
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
    return info, offloaded


def load_raw_gains(model: Any, load: Callable[[], Any]) -> Any:
    """`load()` into `model`; if it finds a raw w, [H], for a folded norm, that w is folded.

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


def _gains(model: Any) -> dict[str, FoldedNorm]:
    """The folded norms of `model` by the names of their parameters."""
    return {
        f"{name}.{module.gain_name}" if name else module.gain_name: module
        for name, module in model.named_modules()
        if isinstance(module, FoldedNorm)
    }
