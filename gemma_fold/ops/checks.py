"""Checks and row layout: what the kernels may read, said before anything is read.

A kernel sees its operands as rows of ``H`` elements with unit stride inside the row and one stride
between rows, or two where the rows are heads of a wider tensor. Anything else is refused here with
a Python error, never read wrongly.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_HIDDEN, MAX_HIDDEN = 1, 16384
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def supports(x: Tensor) -> bool:
    """Whether the norm kernels take rows of this dtype and width."""
    return x.dtype in ACTIVATION_DTYPES and x.shape[-1] <= MAX_HIDDEN


def reference_runs(x: Tensor) -> bool:
    """Whether ``x`` lies where no kernel runs."""
    return not (x.is_cuda or INTERPRETED)


def check_activation(x: Tensor, name: str) -> None:
    """Raises TypeError for a dtype no kernel takes, ValueError for a shape none takes."""
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"{name} must be bfloat16, float16 or float32, not {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, [..., H]")
    if not MIN_HIDDEN <= x.shape[-1] <= MAX_HIDDEN:
        raise ValueError(
            f"{name} has {x.shape[-1]} columns; supported are {MIN_HIDDEN} to {MAX_HIDDEN}"
        )


def check_gamma(gamma: Tensor, x: Tensor, name: str) -> None:
    """``gamma`` must be what a folded checkpoint holds: fp32, contiguous, [H], beside ``x``."""
    if gamma.dtype != torch.float32:
        raise TypeError(f"{name} must be float32 (gamma = 1 + w, folded), not {gamma.dtype}")
    if gamma.dim() != 1 or gamma.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{name} must have shape [{x.shape[-1]}], not {list(gamma.shape)}; "
            "a gamma stored as [H, 1] is passed as gamma.view(-1)"
        )
    if gamma.device != x.device:
        raise ValueError(f"{name} is on {gamma.device} but the activations are on {x.device}")
    if not gamma.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def check_same(other: Tensor, x: Tensor, name: str) -> None:
    """``other`` (a residual) must match ``x`` in dtype, shape and device."""
    if other.dtype != x.dtype:
        raise TypeError(f"{name} is {other.dtype} but x is {x.dtype}; they must be equal")
    if other.shape != x.shape:
        raise ValueError(f"{name} has shape {list(other.shape)} but x has {list(x.shape)}")
    if other.device != x.device:
        raise ValueError(f"{name} is on {other.device} but x is on {x.device}")


def check_scale(scale: Tensor | None, x: Tensor) -> None:
    """A static fp8 scale is one fp32 element on the device of ``x``; None asks for dynamic."""
    if scale is None:
        return
    if scale.dtype != torch.float32:
        raise TypeError(f"scale must be float32, not {scale.dtype}")
    if scale.numel() != 1:
        raise ValueError(f"scale must hold one element, not shape {list(scale.shape)}")
    if scale.device != x.device:
        raise ValueError(f"scale is on {scale.device} but x is on {x.device}")


def check_fp8(x: Tensor) -> None:
    """NVIDIA converts to e4m3 in hardware from compute capability 8.9."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        raise ValueError("fp8 outputs need a GPU of compute capability 8.9 or newer")


def row_stride(x: Tensor, name: str) -> int:
    """Elements from one row of ``x`` to the next. Raises ValueError where no one stride exists."""
    if x.is_contiguous():
        return x.shape[-1]
    stride: int | None = None
    extent = 1  # rows spanned by the dimensions already seen
    if x.shape[-1] == 1 or x.stride(-1) == 1:
        for dim in range(x.dim() - 2, -1, -1):
            if x.shape[dim] == 1:
                continue
            if stride is None:
                stride = x.stride(dim)
            elif x.stride(dim) != stride * extent:
                break
            extent *= x.shape[dim]
        else:
            return x.shape[-1] if stride is None else stride
    raise ValueError(
        f"{name} with shape {list(x.shape)} and strides {list(x.stride())} is not rows of "
        "contiguous elements one stride apart; pass a contiguous copy"
    )


def row_strides(x: Tensor, name: str) -> tuple[int, int, int]:
    """Where the rows of ``x`` lie: one stride apart, or heads [..., heads, H] of a wider tensor.

    Returns:
        Elements from one token to the next, heads a token, and elements from one head to the next;
        ``(stride, 1, 0)`` where all rows are one stride apart.

    Raises:
        ValueError: neither describes them.
    """
    try:
        return row_stride(x, name), 1, 0
    except ValueError:
        if x.dim() < 3 or x.stride(-1) != 1:
            raise
    return token_stride(x, name), x.shape[-2], x.stride(-2)


def token_stride(heads: Tensor, name: str) -> int:
    """Elements from one token's heads to the next, for ``heads`` of shape [..., heads, H]."""
    if heads.shape[-1] > 1 and heads.stride(-1) != 1:
        raise ValueError(f"{name} with strides {list(heads.stride())} has non-contiguous heads")
    return row_stride(heads.select(-2, 0), name)


def check_in_place(x: Tensor, residual: Tensor) -> None:
    """Both are read and then written, as dense rows: no element may belong to both."""
    for name, rows in (("x", x), ("residual", residual)):
        if not rows.is_contiguous():
            raise ValueError(f"{name} is written in place and must be contiguous")
    if shares_memory(x, residual):
        raise ValueError("x and residual share memory; both are written in place")


def shares_memory(x: Tensor, residual: Tensor) -> bool:
    """Whether two contiguous tensors of one size overlap."""
    return abs(x.data_ptr() - residual.data_ptr()) < x.nbytes


def _span(heads: Tensor) -> int:
    """Elements from the first to one past the last of ``heads``."""
    return 1 + sum((n - 1) * stride for n, stride in zip(heads.shape, heads.stride(), strict=True))


def _nested(x: Tensor, *dims: tuple[int, int]) -> bool:
    """Whether ``x``, with more ``dims`` of (stride, size), has one index for each element."""
    reach = 1
    for stride, n in sorted([*zip(x.stride(), x.shape, strict=True), *dims]):
        if n > 1 and stride < reach:
            return False
        reach += (n - 1) * stride
    return True


def check_distinct(x: Tensor, name: str) -> None:
    """``x`` is written: no element of it may have two indices."""
    if x.numel() and not _nested(x):
        raise ValueError(f"{name} has more than one index for some of its elements")


def check_apart(a: Tensor, b: Tensor, names: str) -> None:
    """``a`` and ``b``, of one shape and the same strides, are written: none may lie in both."""
    distance = abs(b.data_ptr() - a.data_ptr()) // a.element_size()
    if a.numel() and not _nested(a, (distance, 2)):
        raise ValueError(f"{names} share memory; both are written")


def check_disjoint(q: Tensor, k: Tensor, name: str = "k") -> None:
    """``q`` and ``k`` [..., heads, H]: ``q`` is written, no element may belong to both.

    Views of one fused tensor interleave, so their ranges overlap where their elements do not.
    """
    check_distinct(q, "q")
    check_distinct(k, name)
    if q.numel() == 0 or k.numel() == 0:
        return
    start = (k.data_ptr() - q.data_ptr()) // q.element_size()
    if start >= _span(q) or -start >= _span(k):
        return
    period, other = token_stride(q, "q"), token_stride(k, "k")
    if period == other and period > 0:
        q_width = _span(q.flatten(0, -3)[0] if q.dim() > 2 else q)
        k_width = _span(k.flatten(0, -3)[0] if k.dim() > 2 else k)
        offset = start % period
        if q_width <= offset and offset + k_width <= period:
            return
    raise ValueError(f"q and {name} share memory; q is written in place")


def memory_order(x: Tensor) -> list[int] | None:
    """The order of leading dimensions that makes ``x`` row-major, or None where it already is.

    Attention code norms heads after a transpose; rows are independent, so such a tensor is
    normed in the order it lies in memory and needs no copy.
    """
    lead = range(x.dim() - 1)
    if x.dim() < 3 or x.is_contiguous():
        return None
    strides = x.stride()
    order = sorted(lead, key=lambda dim: -strides[dim])
    return None if order == list(lead) else [*order, x.dim() - 1]


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes ``order``."""
    back = [0] * len(order)
    for new, old in enumerate(order):
        back[old] = new
    return back


def empty_rows(x: Tensor) -> Tensor:
    """An uninitialised tensor shaped like ``x``, dense, its rows in the memory order of ``x``."""
    order = memory_order(x)
    if order is None:
        return x.new_empty(x.shape)
    return x.new_empty([x.shape[dim] for dim in order]).permute(inverse(order))
