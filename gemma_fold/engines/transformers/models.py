"""Fold and unfold a model that is already in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from gemma_fold.engines.attach.report import Report, announce
from gemma_fold.engines.transformers.layers import Fusion, fuse_layers, split_layers
from gemma_fold.engines.transformers.norms import FoldedNorm, gain_name
from gemma_fold.errors import AlreadyFoldedError, NothingToFoldError, UnsupportedModelError
from gemma_fold.rules import NORM_CLASSES, Fold

Model = TypeVar("Model", bound=nn.Module)


def fold_model(model: Model) -> Model:
    """Fold every zero-centred norm of `model` in place, and return it.

    `model` is a transformers model with its weights loaded. Each norm weight w becomes an fp32
    parameter gamma = 1 + w of shape [H, 1] (or the family's own offset), and the layers that have
    fused kernels use them. The outputs keep their bits on CPU. Parameters stay the objects they
    were, so an optimizer made before trains them; one that has stepped holds state of shape [H] for
    them, and stops at its next step.

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

    Raises UnsupportedModelError where the model is not folded, or is offloaded.
    """
    norms = [module for module in model.modules() if isinstance(module, FoldedNorm)]
    if not norms:
        raise UnsupportedModelError(f"{type(model).__name__} is not folded; there is nothing to do")
    refuse_parametrized(norms)
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

    What was fused, and why not the rest, is said on stderr. Raises UnsupportedModelError where
    something is not fused and GEMMA_FOLD=require asks for all.
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
    """UnsupportedModelError where one of them has a parametrization."""
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
    # The one class that can be told not to add: gamma + float(unit_offset).
    if fold is None or getattr(module, "unit_offset", fold.offset) != fold.offset:
        return None
    return fold
