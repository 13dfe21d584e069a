"""Layers whose `forward` takes the place of a model's; they have no state of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma_fold.ops import checks
from gemma_fold.ops.operators import rms_norm, rms_norm_zero_centered

__all__ = ["RMSNormZeroCentered"]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of any ``x`` that a model's own forward takes; [H, 1] is a folded gamma."""
    folded = weight.dim() == 2
    operator = rms_norm.operator if folded else rms_norm_zero_centered.operator
    gain = weight.view(-1) if folded else weight
    # A compiler fuses the formula with its neighbours.
    if torch.compiler.is_compiling() or not checks.supports(x):
        if folded:
            checks.check_gamma(gain, x, "weight")
        return operator.reference(x, gain, eps)
    try:
        return operator.call((x, gain), (eps,))
    except ValueError:
        if x.is_contiguous():
            raise
    return operator.call((x.contiguous(), gain), (eps,))  # rows that no kernel reads where they lie


class RMSNormZeroCentered(nn.Module):
    """RMSNorm with gain 1 + w, all in fp32 and rounded once to the dtype of ``x``.

    Attributes:
        weight: w, bf16, fp16 or fp32 [H]; or a folded gamma = 1 + w, fp32 [H, 1].
        eps: added to the mean square.
    """

    weight: Tensor
    eps: float
    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [..., H]. Returns [..., H] in the dtype of ``x``."""
        return _norm(x, self.weight, self.eps)
