"""RMSNorm with a zero-centred weight that is not folded: its 1 is added at every call."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from gemma_fold.ops.operators import rms_norm
from gemma_fold.ops.operators.base import Norm, RowOperator


def reference(x: Tensor, weight: Tensor, eps: float, *, norm: Norm = rms_norm.reference) -> Tensor:
    """``x``: [..., H]; ``weight``: w, [H]. Returns [..., H] in the dtype of ``x``."""
    return norm(x, 1.0 + weight.float(), eps)


operator = RowOperator[Tensor](
    "rms_norm_zero_centered",
    reference,
    partial(rms_norm.plan, zero_centered=True),
    partial(reference, norm=rms_norm.rms_norm),
    fp8=False,
)


def rms_norm_zero_centered(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm with gain 1 + w. ``x``: [..., H]; ``weight``: w, bf16, fp16 or fp32 [H].

    For models that are not folded: the bits of :func:`rms_norm` with ``gamma = 1 + w`` in fp32,
    which is added in registers. Where a row is not a multiple of 16 bytes, the sum over it may run
    in another order than there. ``x`` may lie as for :func:`rms_norm`. Differentiable in both;
    the gradient of ``weight`` has its dtype.
    """
    return operator.call((x, weight), (eps,))
