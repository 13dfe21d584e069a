"""RMSNorm of every q head and every k head, in one launch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from gemma_fold.ops.operators.base import HeadsOperator, Norm
from gemma_fold.ops.operators.rms_norm import reference as plain_norm
from gemma_fold.ops.operators.rms_norm import rms_norm

if TYPE_CHECKING:
    from gemma_fold.ops.launch import Plan


def reference(
    q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor, eps: float, *, norm: Norm = plain_norm
) -> tuple[Tensor, Tensor]:
    """The norms of the last dimension of ``q`` and of ``k``."""
    return norm(q, q_gamma, eps), norm(k, k_gamma, eps)


def plan(q: Tensor, k: Tensor, in_place: bool) -> Plan:
    """Called with ``(q, k, q_out, k_out, q_gamma, k_gamma), (eps,)``; outputs dense or in place."""
    from gemma_fold.ops.kernels.qk_rms_norm import qk_rms_norm_kernel
    from gemma_fold.ops.launch import plan_heads

    return plan_heads(qk_rms_norm_kernel, (q, k), in_place)


operator = HeadsOperator(
    "qk_rms_norm", reference, plan, partial(reference, norm=rms_norm), instead="rms_norm"
)


def qk_rms_norm(q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor, eps: float = 1e-6) -> None:
    """RMSNorm of every q head and every k head, in place, in one launch.

    ``q``: [..., q_heads, head_dim]; ``k``: [..., k_heads, head_dim], both usually views of one
    fused qkv tensor; gammas fp32 [head_dim]. Not differentiable.
    """
    operator.call_in_place((q, k, q_gamma, k_gamma), (eps,))
