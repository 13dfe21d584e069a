"""Norm modules of native mode: fp32 gamma, and gemma-fold's operators.

A zero-centred norm becomes one of these in place, by its class and its parameter. The parameter is
fp32 [H, 1], as on disk, so that nothing can copy a raw w into it: vLLM's updates in kernel format
copy without asking a loader, and fail on the shape.

Where vLLM's layer calls two norms in a row, the first one passes its input on, and the second one
does the work of both, together with the all-reduce before them where that was left to it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from gemma_fold import ops
from gemma_fold.engines import arithmetic
from gemma_fold.engines.vllm.weights import Loader

Normed = Tensor | tuple[Tensor, Tensor]


class NativeNorm(GemmaRMSNorm):  # type: ignore[misc]
    """A norm by itself, or after the residual add: ``x``, ``residual``: [tokens, H].

    Attributes:
        weight: gamma, fp32 [H, 1].
        workspace: name of the all-reduce workspace where ``x`` is not summed over the ranks yet.
    """

    weight: nn.Parameter
    variance_epsilon: float
    workspace: str | None

    @property
    def gamma(self) -> Tensor:
        """fp32 [H]."""
        return self.weight.view(-1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Normed:
        if residual is None:
            return ops.rms_norm(x, self.gamma, self.variance_epsilon)
        if self.workspace is None:
            return ops.add_rms_norm(x, residual, self.gamma, self.variance_epsilon)
        return ops.all_reduce_add_rms_norm(
            x, residual, self.gamma, self.workspace, self.variance_epsilon
        )


class PassedNorm(NativeNorm):
    """A norm that is done elsewhere, with this module's gamma."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Normed:
        assert residual is None
        return x


class SandwichNorm(NativeNorm):
    """The norm after a block, the residual add and this norm, as one operator.

    Attributes:
        post: the norm after the block, in a tuple so that it is no submodule.
    """

    post: tuple[PassedNorm]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Normed:
        if residual is None:  # the first layer: there was no block before
            return ops.rms_norm(x, self.gamma, self.variance_epsilon)
        post = self.post[0]
        gammas, epsilons = (post.gamma, self.gamma), (post.variance_epsilon, self.variance_epsilon)
        if self.workspace is None:
            return ops.rms_norm_add_rms_norm(x, residual, *gammas, *epsilons)
        return ops.all_reduce_rms_norm_add_rms_norm(x, residual, *gammas, self.workspace, *epsilons)


class InlineNorm(NativeNorm):
    """A norm as an expression, for a compiler to fuse with what surrounds it."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Normed:
        assert residual is None
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (x32 * scale * self.gamma).to(x.dtype)


def adopt(module: nn.Module, cls: type[NativeNorm], loader: Loader) -> NativeNorm:
    """Turn the zero-centred norm `module` into a `cls` in place, folding what it holds."""
    old = module._parameters["weight"]
    assert old is not None
    gamma = nn.Parameter(arithmetic.fold(old.data, 1.0)[:, None], requires_grad=False)
    gamma.weight_loader = loader  # type: ignore[attr-defined]
    gamma.gemma_fold = True  # type: ignore[attr-defined]
    module._parameters["weight"] = gamma
    module.__class__ = cls
    assert isinstance(module, NativeNorm)
    module.workspace = None
    return module
