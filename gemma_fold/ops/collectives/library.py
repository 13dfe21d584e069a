"""All-reduce by torch.distributed, for where ranks cannot reach each other's memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce(x: Tensor, group: Any) -> Tensor:
    """The sum of `x` over the ranks of `group`, a new tensor in its dtype.

    On CPU it is summed in fp32 and rounded once. NCCL sums in the dtype of `x`, in its own order:
    the fastest it has, and its bits.
    """
    if x.is_cuda or x.dtype == torch.float32:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total
    total = x.to(torch.float32)
    dist.all_reduce(total, group=group)
    return total.to(x.dtype)
