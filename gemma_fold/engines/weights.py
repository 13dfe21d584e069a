"""A gamma and the raw w that it was made of, as tensors, and the manifest that has both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gemma_fold.errors import CheckpointError
from gemma_fold.format import arithmetic
from gemma_fold.format.manifest import FoldedTensor, read_manifest
from gemma_fold.format.names import MANIFEST


def fold(weight: Tensor, offset: float) -> Tensor:
    """fp32 ``offset + weight``."""
    return weight.float() + offset


def unfold(gamma: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype`` whose fold is ``gamma``; exact if ``gamma`` came from one."""
    return (gamma - offset).to(dtype)


def is_gamma(loaded: Tensor, width: int) -> bool:
    """Whether a tensor meant for a norm of `width` is a gamma, fp32 [H, 1], and not a raw w, [H].

    Raises:
        CheckpointError: it is neither.
    """
    if loaded.shape == (width,):
        return False
    if loaded.shape == (width, 1) and loaded.dtype == torch.float32:
        return True
    raise CheckpointError(
        f"a norm weight of shape [{width}] cannot take {loaded.dtype} {list(loaded.shape)}; "
        "send w as [H], or gamma as float32 [H, 1], of the same model"
    )


def original_weight(gamma: Tensor, folded: FoldedTensor) -> Tensor:
    """fp32 w [H] for `gamma`, fp32 [H]: the source's own wherever `gamma` is still its fold.

    For an engine's own norms, which round w themselves: fp32 gamma - offset is the source's w but
    for its last bits, and rounding it to 16 bits gives now and then another value than rounding
    that w once. A gamma that was trained since, or sent by a trainer, gives gamma - offset.
    """
    offset = folded.fold.offset
    subtracted = unfold(gamma, offset, torch.float32)
    if gamma.shape != folded.shape or folded.exceptions is None:
        return subtracted
    values = np.ascontiguousarray(gamma.detach().cpu().numpy())
    raw = arithmetic.unfold(values, folded.dtype, folded.fold, folded.exceptions)
    stored = torch.from_numpy(arithmetic.decode(raw, folded.dtype)).to(gamma.device)
    return torch.where(fold(stored, offset) == gamma, stored, subtracted)


def folded_tensors(name: str, revision: str | None) -> Mapping[str, FoldedTensor]:
    """The folded tensors that a manifest lists, by name.

    Args:
        name: a folder or a Hub id.
        revision: of a Hub id.

    Raises:
        CheckpointError: the manifest is damaged.
        OSError: the Hub does not give it.
    """
    folder = name
    if not os.path.isdir(name):
        from transformers.utils import cached_file

        folder = os.path.dirname(str(cached_file(name, MANIFEST, revision=revision)))
    return read_manifest(Path(folder)).tensors
