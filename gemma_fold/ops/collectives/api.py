"""Public functions of the all-reduce operators; :mod:`gemma_fold.ops` offers them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from gemma_fold.ops.collectives import operators
from gemma_fold.ops.collectives.workspace import AllReduceWorkspace
from gemma_fold.ops.eager import runs_eagerly

_ops = torch.ops.gemma_fold


def _name(workspace: AllReduceWorkspace | str) -> str:
    return workspace if isinstance(workspace, str) else workspace.name


def _refuse_gradients(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError("the all-reduce operators have no backward; run them under torch.no_grad")


def all_reduce(x: Tensor, workspace: AllReduceWorkspace | str) -> Tensor:
    """The sum of ``x`` over the ranks of `workspace`. ``x``: this rank's part, [..., H].

    Returns a new [..., H] in the dtype of ``x``: ranks added in rank order in fp32, rounded once,
    the same bits on every rank. Collective. Any allocation will do for ``x``.
    """
    _refuse_gradients(x)
    if runs_eagerly(x):
        return operators.all_reduce(x, _name(workspace))
    return cast(Tensor, _ops.all_reduce(x, _name(workspace)))


def all_reduce_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor,
    workspace: AllReduceWorkspace | str,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """:func:`all_reduce`, then :func:`gemma_fold.ops.add_rms_norm`, in one kernel.

    ``x``: this rank's part, ``residual``: the same on all ranks, both [..., H] of one dtype;
    ``gamma``: fp32 [H]. Returns ``(y, new_residual)``, rounded where the unfused sequence rounds.
    """
    _refuse_gradients(x, residual, gamma)
    args = (x, residual, gamma, eps, _name(workspace))
    if runs_eagerly(x):
        return operators.all_reduce_add_rms_norm(*args)
    return cast(tuple[Tensor, Tensor], _ops.all_reduce_add_rms_norm(*args))


def all_reduce_rms_norm_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    workspace: AllReduceWorkspace | str,
    post_eps: float = 1e-6,
    pre_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """:func:`all_reduce`, then the Gemma 2/3 sandwich, in one kernel.

    ``x``: this rank's part, ``residual``: the same on all ranks, both [..., H] of one dtype; gammas
    fp32 [H]. Returns ``(y, new_residual)`` as :func:`gemma_fold.ops.rms_norm_add_rms_norm` does.
    """
    _refuse_gradients(x, residual, post_gamma, pre_gamma)
    args = (x, residual, post_gamma, pre_gamma, post_eps, pre_eps, _name(workspace))
    if runs_eagerly(x):
        return operators.all_reduce_rms_norm_add_rms_norm(*args)
    return cast(tuple[Tensor, Tensor], _ops.all_reduce_rms_norm_add_rms_norm(*args))


def all_reduce_add_rms_norm_fp8(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor,
    workspace: AllReduceWorkspace | str,
    eps: float = 1e-6,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`all_reduce_add_rms_norm` with e4m3 output. Returns ``(y, scale, new_residual)``.

    ``scale`` as in :func:`gemma_fold.ops.rms_norm_fp8`; ``new_residual`` keeps the dtype of ``x``.
    """
    args = (x, residual, gamma, eps, _name(workspace), scale)
    if runs_eagerly(x):
        return operators.all_reduce_add_rms_norm_fp8(*args)
    y, scales, total = _ops.all_reduce_add_rms_norm_fp8(*args)
    return y, scales if scale is None else scale, total


def all_reduce_rms_norm_add_rms_norm_fp8(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    workspace: AllReduceWorkspace | str,
    post_eps: float = 1e-6,
    pre_eps: float = 1e-6,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`all_reduce_rms_norm_add_rms_norm` with e4m3 output: ``(y, scale, new_residual)``.

    ``scale`` as in :func:`gemma_fold.ops.rms_norm_fp8`; ``new_residual`` keeps the dtype of ``x``.
    """
    args = (x, residual, post_gamma, pre_gamma, post_eps, pre_eps, _name(workspace), scale)
    if runs_eagerly(x):
        return operators.all_reduce_rms_norm_add_rms_norm_fp8(*args)
    y, scales, total = _ops.all_reduce_rms_norm_add_rms_norm_fp8(*args)
    return y, scales if scale is None else scale, total
