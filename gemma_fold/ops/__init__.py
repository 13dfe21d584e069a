"""RMSNorm operators for folded (fp32) gamma, fused the way Gemma's layers use them.

Activations are bf16, fp16 or fp32, ``[..., H]`` with ``H`` up to 16,384; gammas are fp32 ``[H]``,
already folded (``gamma = 1 + w``). Every norm is ``(x32 * rsqrt(mean(x32^2) + eps) * gamma)``
rounded once, and fused operators round where the unfused sequence rounds. CUDA tensors run Triton
kernels, CPU tensors plain torch. All are torch.library operators (``torch.ops.gemma_fold.*``):
they trace under torch.compile without graph breaks and run in CUDA graphs. Under function
transforms (``torch.func``) and forward-mode differentiation they run as plain torch everywhere;
those with float8 output or an all-reduce have no derivative there either.

On GPUs from Hopper on, a kernel may start while the one before it still runs, and for few rows it
reads gamma at once. What writes a gamma must therefore not signal its dependents before it ends:
torch's kernels do not, nor do these operators.

Raises TypeError for a dtype and ValueError for a shape, device or stride that is not supported.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from gemma_fold.ops import dispatch, reference
from gemma_fold.ops import registry as _registry  # noqa: F401  (registers torch.ops)
from gemma_fold.ops.collectives.api import (
    all_reduce,
    all_reduce_add_rms_norm,
    all_reduce_add_rms_norm_fp8,
    all_reduce_rms_norm_add_rms_norm,
    all_reduce_rms_norm_add_rms_norm_fp8,
)
from gemma_fold.ops.collectives.workspace import AllReduceWorkspace
from gemma_fold.ops.eager import is_transformed, runs_eagerly

__all__ = [
    "AllReduceWorkspace",
    "add_rms_norm",
    "add_rms_norm_",
    "add_rms_norm_fp8",
    "all_reduce",
    "all_reduce_add_rms_norm",
    "all_reduce_add_rms_norm_fp8",
    "all_reduce_rms_norm_add_rms_norm",
    "all_reduce_rms_norm_add_rms_norm_fp8",
    "qk_rms_norm",
    "qk_rms_norm_rope",
    "rms_norm",
    "rms_norm_add_rms_norm",
    "rms_norm_add_rms_norm_",
    "rms_norm_add_rms_norm_fp8",
    "rms_norm_fp8",
]

_ops = torch.ops.gemma_fold
# Bound once: it runs on every call, and a small norm is over in a few microseconds.
_grad_enabled = torch.is_grad_enabled


def rms_norm(x: Tensor, gamma: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm with fp32 gain. ``x``: [..., H]; ``gamma``: fp32 [H]. Differentiable in both.

    Derivatives of any order and tangents are those of the plain formula.
    Returns [..., H] in the dtype of ``x``. ``x`` may have any row stride, be heads
    [..., heads, H] cut out of a wider tensor, or have its leading dimensions transposed; the
    columns must be contiguous.
    """
    if runs_eagerly(x) and not (_grad_enabled() and (x.requires_grad or gamma.requires_grad)):
        return dispatch.rms_norm(x, gamma, eps)
    if is_transformed():
        dispatch.check_rms_norm(x, gamma)
        return reference.rms_norm(x, gamma, eps)
    return cast(Tensor, _ops.rms_norm(x, gamma, eps))


def add_rms_norm(
    x: Tensor, residual: Tensor, gamma: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Residual add, then RMSNorm. ``x``, ``residual``: [..., H] of one dtype; ``gamma``: fp32 [H].

    Returns ``(y, new_residual)`` with ``new_residual = residual + x`` rounded to the dtype of
    ``x`` and ``y = rms_norm(new_residual)``. Differentiable.
    """
    trained = _grad_enabled() and (x.requires_grad or residual.requires_grad or gamma.requires_grad)
    if not trained and runs_eagerly(x):
        return dispatch.add_rms_norm(x, residual, gamma, eps)
    if trained or is_transformed():
        dispatch.check_add(x, residual, gamma)
        total = residual + x
        return rms_norm(total, gamma, eps), total
    return cast(tuple[Tensor, Tensor], _ops.add_rms_norm(x, residual, gamma, eps))


def rms_norm_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float = 1e-6,
    pre_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The sandwich between two Gemma 2/3 blocks: post-norm, residual add, next pre-norm.

    ``x``, ``residual``: [..., H] of one dtype; both gammas fp32 [H]. Returns ``(y, new_residual)``
    with ``new_residual = residual + rms_norm(x, post_gamma)`` and
    ``y = rms_norm(new_residual, pre_gamma)``, each rounded to the dtype of ``x``. Differentiable.
    """
    trained = _grad_enabled() and (
        x.requires_grad
        or residual.requires_grad
        or post_gamma.requires_grad
        or pre_gamma.requires_grad
    )
    args = (x, residual, post_gamma, pre_gamma, post_eps, pre_eps)
    if not trained and runs_eagerly(x):
        return dispatch.rms_norm_add_rms_norm(*args)
    if trained or is_transformed():
        dispatch.check_sandwich(x, residual, post_gamma, pre_gamma)
        return add_rms_norm(rms_norm(x, post_gamma, post_eps), residual, pre_gamma, pre_eps)
    return cast(tuple[Tensor, Tensor], _ops.rms_norm_add_rms_norm(*args))


def add_rms_norm_(x: Tensor, residual: Tensor, gamma: Tensor, eps: float = 1e-6) -> None:
    """:func:`add_rms_norm` in place: ``x`` becomes the norm, ``residual`` the new residual.

    The same bits without new memory, for code that needs neither operand afterwards. Both are
    contiguous and share no memory. Not differentiable. Under torch.compile it becomes
    :func:`add_rms_norm` and two copies: use that one there.
    """
    if _grad_enabled() and (x.requires_grad or residual.requires_grad or gamma.requires_grad):
        raise ValueError("add_rms_norm_ works in place and has no backward; use add_rms_norm")
    if runs_eagerly(x):
        dispatch.add_rms_norm_(x, residual, gamma, eps)
    else:
        # Inductor can lose the offset of a view that a traced operator mutates; copies it fuses.
        y, total = add_rms_norm(x, residual, gamma, eps)
        x.copy_(y)
        residual.copy_(total)


def rms_norm_add_rms_norm_(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float = 1e-6,
    pre_eps: float = 1e-6,
) -> None:
    """:func:`rms_norm_add_rms_norm` in place, under the rules of :func:`add_rms_norm_`."""
    if _grad_enabled() and (
        x.requires_grad
        or residual.requires_grad
        or post_gamma.requires_grad
        or pre_gamma.requires_grad
    ):
        raise ValueError(
            "rms_norm_add_rms_norm_ works in place and has no backward; use rms_norm_add_rms_norm"
        )
    args = (x, residual, post_gamma, pre_gamma, post_eps, pre_eps)
    if runs_eagerly(x):
        dispatch.rms_norm_add_rms_norm_(*args)
    else:
        y, total = rms_norm_add_rms_norm(*args)
        x.copy_(y)
        residual.copy_(total)


def qk_rms_norm(q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor, eps: float = 1e-6) -> None:
    """RMSNorm of every q head and every k head, in place, in one launch.

    ``q``: [..., q_heads, head_dim]; ``k``: [..., k_heads, head_dim], both usually views of one
    fused qkv tensor; gammas fp32 [head_dim]. Not differentiable.
    """
    if _grad_enabled() and (
        q.requires_grad or k.requires_grad or q_gamma.requires_grad or k_gamma.requires_grad
    ):
        raise ValueError("qk_rms_norm works in place and has no backward; use rms_norm to train")
    if runs_eagerly(q):
        dispatch.qk_rms_norm_(q, k, q_gamma, k_gamma, eps)
    else:
        # Through copies, for the reason given in add_rms_norm_.
        if is_transformed():
            dispatch.check_qk(q, k, q_gamma, k_gamma)
            q_normed, k_normed = rms_norm(q, q_gamma, eps), rms_norm(k, k_gamma, eps)
        else:
            q_normed, k_normed = _ops.qk_rms_norm(q, k, q_gamma, k_gamma, eps)
        q.copy_(q_normed)
        k.copy_(k_normed)


def qk_rms_norm_rope(
    q: Tensor,
    k: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos_sin: Tensor,
    positions: Tensor | None,
    eps: float = 1e-6,
    *,
    interleaved: bool = False,
) -> None:
    """:func:`qk_rms_norm`, then rotary position embedding, in place, in one launch.

    ``q``, ``k``, gammas: as in :func:`qk_rms_norm`. ``cos_sin`` holds the cosines in the first half
    of its columns and the sines in the second: [max_positions, rotary_dim], indexed by
    ``positions`` (int32 or int64 [...], contiguous), or with ``positions=None`` one row for each
    token, [..., rotary_dim]. The first ``rotary_dim`` <= head_dim columns of each head rotate, by
    halves as in GPT-NeoX or, ``interleaved``, in neighbouring pairs as in GPT-J; the others are
    only normed.

    ``cos_sin`` has the dtype of ``q`` or is fp32, and that chooses the rounding. Norms round to the
    dtype of ``q`` first; products and their sum then round to the dtype of ``cos_sin``, so that
    fp32 rounds once more at the end and the dtype of ``q`` rounds as transformers does.
    A position outside ``cos_sin`` reads nothing and gives NaN in the columns that rotate.
    Not differentiable.
    """
    if _grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or q_gamma.requires_grad
        or k_gamma.requires_grad
        or cos_sin.requires_grad
    ):
        raise ValueError(
            "qk_rms_norm_rope works in place and has no backward; "
            "use rms_norm and a rotary embedding of its own to train"
        )
    args = (q, k, q_gamma, k_gamma, cos_sin, positions, eps, interleaved)
    if runs_eagerly(q):
        dispatch.qk_rms_norm_rope_(*args)
    else:
        # Through copies, for the reason given in add_rms_norm_.
        if is_transformed():
            dispatch.check_qk_rope(*args[:6])
            q_turned, k_turned = reference.qk_rms_norm_rope(*args)
        else:
            q_turned, k_turned = _ops.qk_rms_norm_rope(*args)
        q.copy_(q_turned)
        k.copy_(k_turned)


def rms_norm_fp8(
    x: Tensor, gamma: Tensor, eps: float = 1e-6, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm`, then quantisation to float8_e4m3fn. Returns ``(y, scale)``.

    ``scale`` is fp32 with one element (static: ``y = norm / scale``, saturating, and it is
    returned as it is), or None: one scale per token, fp32 [..., 1], the row's largest magnitude
    over 448 and at least 1 / (448 * 512). The norm is rounded to the dtype of ``x`` first, as in
    the unfused sequence. Not differentiable.
    """
    if runs_eagerly(x):
        return dispatch.rms_norm_fp8(x, gamma, eps, scale)
    y, scales = _ops.rms_norm_fp8(x, gamma, eps, scale)
    return y, scales if scale is None else scale


def add_rms_norm_fp8(
    x: Tensor, residual: Tensor, gamma: Tensor, eps: float = 1e-6, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`add_rms_norm` with fp8 output. Returns ``(y, scale, new_residual)``.

    ``scale`` as in :func:`rms_norm_fp8`; ``new_residual`` keeps the dtype of ``x``.
    """
    if runs_eagerly(x):
        return dispatch.add_rms_norm_fp8(x, residual, gamma, eps, scale)
    y, scales, total = _ops.add_rms_norm_fp8(x, residual, gamma, eps, scale)
    return y, scales if scale is None else scale, total


def rms_norm_add_rms_norm_fp8(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float = 1e-6,
    pre_eps: float = 1e-6,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rms_norm_add_rms_norm` with fp8 output. Returns ``(y, scale, new_residual)``.

    ``scale`` as in :func:`rms_norm_fp8`; ``new_residual`` keeps the dtype of ``x``.
    """
    args = (x, residual, post_gamma, pre_gamma, post_eps, pre_eps, scale)
    if runs_eagerly(x):
        return dispatch.rms_norm_add_rms_norm_fp8(*args)
    y, scales, total = _ops.rms_norm_add_rms_norm_fp8(*args)
    return y, scales if scale is None else scale, total
