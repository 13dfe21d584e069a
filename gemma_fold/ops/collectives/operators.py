"""The all-reduce operators: one kernel over peer memory, or the library's sum and a fused norm."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_fold.ops import checks, dispatch
from gemma_fold.ops.collectives.workspace import find
from gemma_fold.ops.reference import FP8

_VECTOR_BYTES = 16


def _rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _aligned(gamma: Tensor) -> Tensor:
    return gamma.clone() if gamma.data_ptr() % _VECTOR_BYTES else gamma


def _mode(scale: Tensor | None) -> str:
    return "per_token" if scale is None else "static"


def _scales(x: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        return scale
    return torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def all_reduce(x: Tensor, workspace: str) -> Tensor:
    checks.check_activation(x, "x")
    space = find(workspace)
    space.check_agreement("all_reduce", x)
    exchange = space.exchange_for(x)
    if exchange is None:
        return space.reduce_by_library(x)
    y = _rows(x)
    exchange.run("sum", x, y)
    return y


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, gamma: Tensor, eps: float, workspace: str
) -> tuple[Tensor, Tensor]:
    dispatch.check_add(x, residual, gamma)
    space = find(workspace)
    space.check_agreement("all_reduce_add_rms_norm", x)
    exchange = space.exchange_for(x)
    if exchange is None:
        return dispatch.add_rms_norm(space.reduce_by_library(x), residual, gamma, eps)
    y, total = _rows(x), _rows(x)
    exchange.run("add_norm", x, y, residual, total, (None, _aligned(gamma)), (0.0, eps))
    return y, total


def all_reduce_rms_norm_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
    workspace: str,
) -> tuple[Tensor, Tensor]:
    dispatch.check_sandwich(x, residual, post_gamma, pre_gamma)
    space = find(workspace)
    space.check_agreement("all_reduce_rms_norm_add_rms_norm", x)
    exchange = space.exchange_for(x)
    if exchange is None:
        total = space.reduce_by_library(x)
        return dispatch.rms_norm_add_rms_norm(
            total, residual, post_gamma, pre_gamma, post_eps, pre_eps
        )
    y, total = _rows(x), _rows(x)
    gammas = (_aligned(post_gamma), _aligned(pre_gamma))
    exchange.run("norm_add_norm", x, y, residual, total, gammas, (post_eps, pre_eps))
    return y, total


def all_reduce_add_rms_norm_fp8(
    x: Tensor, residual: Tensor, gamma: Tensor, eps: float, workspace: str, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.check_add(x, residual, gamma)
    checks.check_scale(scale, x)
    space = find(workspace)
    space.check_agreement("all_reduce_add_rms_norm_fp8", x)
    exchange = space.exchange_for(x)
    if exchange is None or exchange.portable:
        total = all_reduce(x, workspace)
        return dispatch.add_rms_norm_fp8(total, residual, gamma, eps, scale)
    checks.check_fp8(x)
    y, total, scales = _rows(x, FP8), _rows(x), _scales(x, scale)
    gammas = (None, _aligned(gamma))
    exchange.run("add_norm", x, y, residual, total, gammas, (0.0, eps), _mode(scale), scales)
    return y, scales, total


def all_reduce_rms_norm_add_rms_norm_fp8(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
    workspace: str,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.check_sandwich(x, residual, post_gamma, pre_gamma)
    checks.check_scale(scale, x)
    space = find(workspace)
    space.check_agreement("all_reduce_rms_norm_add_rms_norm_fp8", x)
    exchange = space.exchange_for(x)
    if exchange is None or exchange.portable:
        total = all_reduce(x, workspace)
        return dispatch.rms_norm_add_rms_norm_fp8(
            total, residual, post_gamma, pre_gamma, post_eps, pre_eps, scale
        )
    checks.check_fp8(x)
    y, total, scales = _rows(x, FP8), _rows(x), _scales(x, scale)
    gammas = (_aligned(post_gamma), _aligned(pre_gamma))
    eps = (post_eps, pre_eps)
    exchange.run("norm_add_norm", x, y, residual, total, gammas, eps, _mode(scale), scales)
    return y, scales, total
