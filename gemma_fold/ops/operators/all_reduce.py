"""The all-reduce, alone or with the norms after it: one kernel over peer memory, or the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_fold.ops import checks
from gemma_fold.ops.collectives.exchange import PeerExchange
from gemma_fold.ops.collectives.tuning import VECTOR_BYTES
from gemma_fold.ops.collectives.workspace import AllReduceWorkspace, find
from gemma_fold.ops.operators import add_rms_norm, rms_norm_add_rms_norm
from gemma_fold.ops.operators.base import FP8, RowOperator, register, runs_eagerly

Outputs = tuple[Tensor, Tensor]


def _name(workspace: AllReduceWorkspace | str) -> str:
    return workspace if isinstance(workspace, str) else workspace.name


def _refuse_gradients(tensors: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError("the all-reduce operators have no backward; run them under torch.no_grad")


def _aligned(gamma: Tensor) -> Tensor:
    return gamma.clone() if gamma.data_ptr() % VECTOR_BYTES else gamma


def _found(
    operator: str, x: Tensor, workspace: str
) -> tuple[AllReduceWorkspace, PeerExchange | None]:
    space = find(workspace)
    space.check_agreement(operator, x)
    return space, space.exchange_for(x)


def _run_all_reduce(x: Tensor, workspace: str) -> Tensor:
    checks.check_activation(x, "x")
    space, exchange = _found("all_reduce", x, workspace)
    if exchange is None:
        return space.reduce_by_library(x)
    y = x.new_empty(x.shape)
    exchange.run("sum", x, y)
    return y


def _fake_all_reduce(x: Tensor, workspace: str) -> Tensor:
    checks.check_activation(x, "x")
    return x.new_empty(x.shape)


_traced = register(
    "all_reduce", ["Tensor x", "str workspace"], 1, _run_all_reduce, _fake_all_reduce
)


class _Reduced(RowOperator[Outputs]):
    """An all-reduce of ``x``, then an operator on rows: by the kernel of that name, or apart."""

    def __init__(self, then: RowOperator[Outputs], kernel: str) -> None:
        self.then = then
        self.kernel = kernel
        super().__init__(
            f"all_reduce_{then.name}", then.reference, then.plan, extra=["str workspace"]
        )

    def call(self, tensors: Any, rest: Any, bare: bool = False) -> Outputs:
        """The plain form. Raises ValueError if it is to be differentiated."""
        if not bare:
            _refuse_gradients(tensors)
            if not runs_eagerly(tensors[0]):
                return self.traced(*tensors, *rest)
        self.check(*tensors)
        (x, *others), (*eps, workspace) = tensors, rest
        space, exchange = _found(self.name, x, workspace)
        if exchange is None:
            return self.then.call((space.reduce_by_library(x), *others), tuple(eps), True)
        y, total = x.new_empty(x.shape), x.new_empty(x.shape)
        self._fuse(exchange, tensors, y, total, eps)
        return y, total

    def call_fp8(self, tensors: Any, rest: Any, scale: Tensor | None, bare: bool = False) -> Any:
        """The form with e4m3 output: the norm, its scale, the new residual."""
        if not bare and not runs_eagerly(tensors[0]):
            return self.watched_fp8(tensors, rest, scale)
        self.check(*tensors)
        (x, *others), (*eps, workspace) = tensors, rest
        checks.check_scale(scale, x)
        _, exchange = _found(self.name_fp8, x, workspace)
        if exchange is None or exchange.portable:
            total = _run_all_reduce(x, workspace)
            return self.then.call_fp8((total, *others), tuple(eps), scale, True)
        checks.check_fp8(x)
        y, total = x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape)
        mode, scales = "static", scale
        if scales is None:
            mode, scales = "per_token", x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        self._fuse(exchange, tensors, y, total, eps, mode, scales)
        return y, scales, total

    def _fuse(
        self,
        exchange: PeerExchange,
        tensors: Sequence[Tensor],
        y: Tensor,
        total: Tensor,
        eps: Sequence[float],
        *fp8: Any,
    ) -> None:
        """Run the kernel, which takes the gamma and the epsilon of a post-norm first."""
        x, residual, *gammas = tensors
        *_, post, pre = None, *map(_aligned, gammas)
        *_, post_eps, pre_eps = 0.0, *eps
        exchange.run(self.kernel, x, y, residual, total, (post, pre), (post_eps, pre_eps), *fp8)

    def like(self, x: Tensor) -> Tensor:
        """Outputs are contiguous."""
        return x.new_empty(x.shape)


_add = _Reduced(add_rms_norm.operator, "add_norm")
_sandwich = _Reduced(rms_norm_add_rms_norm.operator, "norm_add_norm")


def all_reduce(x: Tensor, workspace: AllReduceWorkspace | str) -> Tensor:
    """The sum of ``x`` over the ranks of `workspace`. ``x``: this rank's part, [..., H].

    Returns a new [..., H] in the dtype of ``x``: ranks added in rank order in fp32, rounded once,
    the same bits on every rank. Collective. Any allocation will do for ``x``.
    """
    _refuse_gradients((x,))
    run = _run_all_reduce if runs_eagerly(x) else _traced
    return run(x, _name(workspace))


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, gamma: Tensor,
    workspace: AllReduceWorkspace | str, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`all_reduce`, then :func:`gemma_fold.ops.add_rms_norm`, in one kernel.

    ``x``: this rank's part, ``residual``: the same on all ranks, both [..., H] of one dtype;
    ``gamma``: fp32 [H]. Returns ``(y, new_residual)``, rounded where the unfused sequence rounds.
    """
    return _add.call((x, residual, gamma), (eps, _name(workspace)))


def all_reduce_rms_norm_add_rms_norm(
    x: Tensor, residual: Tensor, post_gamma: Tensor, pre_gamma: Tensor,
    workspace: AllReduceWorkspace | str, post_eps: float = 1e-6, pre_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`all_reduce`, then the Gemma 2/3 sandwich, in one kernel.

    ``x``: this rank's part, ``residual``: the same on all ranks, both [..., H] of one dtype; gammas
    fp32 [H]. Returns ``(y, new_residual)`` as :func:`gemma_fold.ops.rms_norm_add_rms_norm` does.
    """
    tensors = (x, residual, post_gamma, pre_gamma)
    return _sandwich.call(tensors, (post_eps, pre_eps, _name(workspace)))


def all_reduce_add_rms_norm_fp8(
    x: Tensor, residual: Tensor, gamma: Tensor,
    workspace: AllReduceWorkspace | str, eps: float = 1e-6, scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`all_reduce_add_rms_norm` with e4m3 output. Returns ``(y, scale, new_residual)``.

    ``scale`` as in :func:`gemma_fold.ops.rms_norm_fp8`; ``new_residual`` keeps the dtype of ``x``.
    """
    y, scales, total = _add.call_fp8((x, residual, gamma), (eps, _name(workspace)), scale)
    return y, scales, total


def all_reduce_rms_norm_add_rms_norm_fp8(
    x: Tensor, residual: Tensor, post_gamma: Tensor, pre_gamma: Tensor,
    workspace: AllReduceWorkspace | str, post_eps: float = 1e-6, pre_eps: float = 1e-6,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`all_reduce_rms_norm_add_rms_norm` with e4m3 output: ``(y, scale, new_residual)``.

    ``scale`` as in :func:`gemma_fold.ops.rms_norm_fp8`; ``new_residual`` keeps the dtype of ``x``.
    """
    tensors, rest = (x, residual, post_gamma, pre_gamma), (post_eps, pre_eps, _name(workspace))
    y, scales, total = _sandwich.call_fp8(tensors, rest, scale)
    return y, scales, total
