"""The raw w that a gamma was made of, for the engines' own norms, which round it themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gemma_fold.engines import arithmetic
from gemma_fold.format.arithmetic import decode, unfold
from gemma_fold.format.manifest import FoldedTensor, read_manifest
from gemma_fold.format.names import MANIFEST


def original_weight(gamma: Tensor, folded: FoldedTensor) -> Tensor:
    """fp32 w [H] for `gamma`, fp32 [H]: the source's own wherever `gamma` is still its fold.

    fp32 gamma - offset is the source's w but for its last bits, and rounding it to 16 bits gives
    now and then another value than rounding that w once. A gamma that was trained since, or sent by
    a trainer, is no fold of it and gives gamma - offset.
    """
    offset = folded.fold.offset
    subtracted = arithmetic.unfold(gamma, offset, torch.float32)
    if gamma.shape != folded.shape or folded.exceptions is None:
        return subtracted
    values = np.ascontiguousarray(gamma.detach().cpu().numpy())
    raw = unfold(values, folded.dtype, folded.fold, folded.exceptions)
    stored = torch.from_numpy(decode(raw, folded.dtype)).to(gamma.device)
    return torch.where(arithmetic.fold(stored, offset) == gamma, stored, subtracted)


def folded_tensors(name: str, revision: str | None) -> Mapping[str, FoldedTensor]:
    """By name, what the manifest of a folder or a Hub id says of its folded tensors.

    Raises CheckpointError where it is damaged, and OSError where the Hub does not give it.
    """
    folder = name
    if not os.path.isdir(name):
        from transformers.utils import cached_file

        folder = os.path.dirname(str(cached_file(name, MANIFEST, revision=revision)))
    return read_manifest(Path(folder)).tensors
