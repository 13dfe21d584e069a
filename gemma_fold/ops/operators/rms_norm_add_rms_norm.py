"""The sandwich between two Gemma 2/3 blocks: post-norm, residual add, next pre-norm."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from gemma_fold.ops.operators import add_rms_norm
from gemma_fold.ops.operators.base import Norm, RowOperator
from gemma_fold.ops.operators.rms_norm import reference as plain_norm
from gemma_fold.ops.operators.rms_norm import rms_norm

if TYPE_CHECKING:
    from gemma_fold.ops.launch import Plan


def reference(
    x: Tensor, residual: Tensor, post_gamma: Tensor, pre_gamma: Tensor,
    post_eps: float, pre_eps: float, *, norm: Norm = plain_norm,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns ``(norm(s, pre), s)`` with ``s = residual + norm(x, post)``."""
    normed = norm(x, post_gamma, post_eps)
    return add_rms_norm.reference(normed, residual, pre_gamma, pre_eps, norm=norm)


def plan(x: Tensor, residual: Tensor, fp8: str | None = None) -> Plan:
    """Called with ``(x, residual, post_gamma, pre_gamma, y, total, scale), (post, pre)`` eps."""
    from gemma_fold.ops import launch
    from gemma_fold.ops.kernels.rms_norm_add_rms_norm import rms_norm_add_rms_norm_kernel

    rows, row_bytes = launch.row_size(x)
    return launch.plan_rows(
        rms_norm_add_rms_norm_kernel,
        x,
        residual,
        fp8,
        late=launch.warps_per_row(row_bytes) == 1 and 64 < rows <= launch.MANY_ROWS,
        late_gamma=rows > launch.MANY_ROWS and 8192 < row_bytes <= 12288,
    )


operator = RowOperator[tuple[Tensor, Tensor]](
    "rms_norm_add_rms_norm", reference, plan, partial(reference, norm=rms_norm), in_place=True
)


def rms_norm_add_rms_norm(
    x: Tensor, residual: Tensor, post_gamma: Tensor, pre_gamma: Tensor,
    post_eps: float = 1e-6, pre_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sandwich between two Gemma 2/3 blocks: post-norm, residual add, next pre-norm.

    ``x``, ``residual``: [..., H] of one dtype; both gammas fp32 [H]. Returns ``(y, new_residual)``
    with ``new_residual = residual + rms_norm(x, post_gamma)`` and
    ``y = rms_norm(new_residual, pre_gamma)``, each rounded to the dtype of ``x``. Differentiable.
    """
    return operator.call((x, residual, post_gamma, pre_gamma), (post_eps, pre_eps))


def rms_norm_add_rms_norm_(
    x: Tensor, residual: Tensor, post_gamma: Tensor, pre_gamma: Tensor,
    post_eps: float = 1e-6, pre_eps: float = 1e-6,
) -> None:  # fmt: skip
    """:func:`rms_norm_add_rms_norm` in place, under the rules of :func:`add_rms_norm_`."""
    operator.call_in_place((x, residual, post_gamma, pre_gamma), (post_eps, pre_eps))


def rms_norm_add_rms_norm_fp8(
    x: Tensor, residual: Tensor, post_gamma: Tensor, pre_gamma: Tensor,
    post_eps: float = 1e-6, pre_eps: float = 1e-6, scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`rms_norm_add_rms_norm` with fp8 output. Returns ``(y, scale, new_residual)``.

    ``scale`` as in :func:`rms_norm_fp8`; ``new_residual`` keeps the dtype of ``x``.
    """
    tensors, eps = (x, residual, post_gamma, pre_gamma), (post_eps, pre_eps)
    y, scales, total = operator.call_fp8(tensors, eps, scale)
    return y, scales, total
