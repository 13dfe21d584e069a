"""Residual add, then RMSNorm."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from gemma_fold.ops.operators.base import Norm, RowOperator
from gemma_fold.ops.operators.rms_norm import reference as plain_norm
from gemma_fold.ops.operators.rms_norm import rms_norm

if TYPE_CHECKING:
    from gemma_fold.ops.launch import Plan


def reference(
    x: Tensor, residual: Tensor, gamma: Tensor, eps: float, *, norm: Norm = plain_norm
) -> tuple[Tensor, Tensor]:
    """Returns ``(norm(s), s)`` with ``s = residual + x`` rounded to the dtype of ``x``."""
    total = residual + x
    return norm(total, gamma, eps), total


def plan(x: Tensor, residual: Tensor, fp8: str | None = None) -> Plan:
    """Called with ``(x, residual, gamma, y, total, scale), (eps,)``."""
    from gemma_fold.ops import launch
    from gemma_fold.ops.kernels.add_rms_norm import add_rms_norm_kernel

    rows, row_bytes = launch.row_size(x)
    # All rows can be on the GPU at once, if only gamma takes no registers meanwhile.
    one_wave = not fp8 and 2 * launch.LONE_ROWS < rows <= 1024 and 5120 < row_bytes <= 8192
    # One row a program would leave some SMs a third one and others only their first.
    uneven = row_bytes > 12288 and launch.LONE_ROWS < rows <= 2 * launch.LONE_ROWS
    return launch.plan_rows(
        add_rms_norm_kernel,
        x,
        residual,
        fp8,
        pair=one_wave or uneven,
        late=one_wave and rows <= launch.MANY_ROWS,
        late_gamma=one_wave,
    )


operator = RowOperator[tuple[Tensor, Tensor]](
    "add_rms_norm", reference, plan, partial(reference, norm=rms_norm), in_place=True
)


def add_rms_norm(
    x: Tensor, residual: Tensor, gamma: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Residual add, then RMSNorm. ``x``, ``residual``: [..., H] of one dtype; ``gamma``: fp32 [H].

    Returns ``(y, new_residual)`` with ``new_residual = residual + x`` rounded to the dtype of
    ``x`` and ``y = rms_norm(new_residual)``. Differentiable.
    """
    return operator.call((x, residual, gamma), (eps,))


def add_rms_norm_(x: Tensor, residual: Tensor, gamma: Tensor, eps: float = 1e-6) -> None:
    """:func:`add_rms_norm` in place: ``x`` becomes the norm, ``residual`` the new residual.

    The same bits without new memory, for code that needs neither operand afterwards. Both are
    contiguous and share no memory. Not differentiable. Under torch.compile it becomes
    :func:`add_rms_norm` and two copies: use that one there.
    """
    operator.call_in_place((x, residual, gamma), (eps,))


def add_rms_norm_fp8(
    x: Tensor, residual: Tensor, gamma: Tensor, eps: float = 1e-6, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`add_rms_norm` with fp8 output. Returns ``(y, scale, new_residual)``.

    ``scale`` as in :func:`rms_norm_fp8`; ``new_residual`` keeps the dtype of ``x``.
    """
    y, scales, total = operator.call_fp8((x, residual, gamma), (eps,), scale)
    return y, scales, total
