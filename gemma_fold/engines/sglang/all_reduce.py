"""SGLang's fused all-reduce, residual add and norm, on exact gains.

SGLang gives FlashInfer `gemma_weight`, 1 + w rounded to the model's dtype. FlashInfer can add the
1 itself, in fp32 (`weight_bias`), so it gets the raw w here, and the result is that of SGLang's own
unfused norm. The call happens inside an operator of our own, because SGLang's has no argument for
it and a traced graph would forget anything else that was set around it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gemma_fold import ops
from gemma_fold.engines.sglang.norms import GainedNorm, attention_group_size, sum_over_attention

_BIAS = 1.0
_MAX_TOKENS = 2048  # what SGLang's own workspace holds


def forward_fused(
    original: Callable[..., Any],
    norm: Any,
    x: Tensor,
    residual: Tensor | None,
    post_residual_addition: Tensor | None,
    weight: Tensor,
    use_attn_tp_group: bool = True,
) -> Any:
    """Around the function behind every `forward_with_allreduce_fusion` of SGLang's norms.

    ``x``, ``residual``: [tokens, H]; ``x`` is this rank's part of a sum over the ranks, those that
    share one attention if `use_attn_tp_group`. SGLang's zero-centred norms always do.
    """
    if (
        isinstance(norm, GainedNorm)
        and residual is not None
        and use_attn_tp_group
        and attention_group_size() > 1
    ):
        total = residual
        if post_residual_addition is not None:
            total = residual + post_residual_addition
        fused = norm.all_reduce_add_norm(x, total)
        if fused is not None:
            return fused
    return original(norm, x, residual, post_residual_addition, weight, use_attn_tp_group)


class StockNorm(GainedNorm):
    """A zero-centred norm that runs SGLang's kernels."""

    def all_reduce_add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor] | None:
        if not _takes_bias():
            return None
        fused: tuple[Tensor, Tensor] = torch.ops.gemma_fold.sglang_all_reduce_add_rms_norm(
            x, residual, self.weight.data, self.gamma32, self.epsilon
        )
        return fused


@cache
def _takes_bias() -> bool:
    from sglang.srt.layers import flashinfer_comm_fusion as fusion

    function = getattr(fusion._flashinfer_comm, "allreduce_fusion", None)
    return function is not None and "weight_bias" in inspect.signature(function).parameters


class _Biased:
    """`flashinfer.comm` whose fused all-reduce adds 1 to the weight it is given."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def allreduce_fusion(self, **kwargs: Any) -> Any:
        return self._comm.allreduce_fusion(weight_bias=_BIAS, **kwargs)


@contextmanager
def _weight_bias(fusion: Any) -> Iterator[None]:
    comm = fusion._flashinfer_comm
    fusion._flashinfer_comm = _Biased(comm)
    try:
        yield
    finally:
        fusion._flashinfer_comm = comm


@torch.library.custom_op("gemma_fold::sglang_all_reduce_add_rms_norm", mutates_args=())
def _all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from sglang.srt.layers import flashinfer_comm_fusion as fusion

    with _weight_bias(fusion):
        normed, total = fusion.flashinfer_allreduce_residual_rmsnorm(
            input_tensor=x,
            residual=residual,
            weight=weight,
            eps=eps,
            max_token_num=max(x.shape[0], _MAX_TOKENS),
            use_attn_tp_group=True,
        )
    if normed is not None:
        return normed, total
    return ops.add_rms_norm(sum_over_attention(x), residual, gamma, eps)


@_all_reduce_add_rms_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(residual)
