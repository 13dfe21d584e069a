"""The sum that every rank must get, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rank_ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    """``parts``: each rank's [..., H]. Summed in that order in fp32, rounded once."""
    total = parts[0].to(torch.float32)
    for part in parts[1:]:
        total = total + part.to(torch.float32)
    return total.to(parts[0].dtype)
