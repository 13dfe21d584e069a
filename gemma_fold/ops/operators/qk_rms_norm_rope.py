"""RMSNorm of every q head and every k head, then rotary position embedding, in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_fold.ops import checks
from gemma_fold.ops.operators.base import HeadsOperator
from gemma_fold.ops.operators.rms_norm import reference as plain_norm

if TYPE_CHECKING:
    from gemma_fold.ops.launch import Plan


def rows_at(cos_sin: Tensor, positions: Tensor) -> Tensor:
    """The rows of a table [n, rotary_dim] at ``positions`` [...]: NaN outside [0, n)."""
    held = (positions >= 0) & (positions < cos_sin.shape[0])
    taken = cos_sin[positions.long().clamp(0, cos_sin.shape[0] - 1)]
    return taken.masked_fill(~held.unsqueeze(-1), float("nan"))


def rotate(x: Tensor, cos_sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
    """Rotary embedding of the first ``rotary_dim`` columns of ``x`` [..., heads, head_dim].

    ``cos_sin``: [n, rotary_dim] with ``positions`` [...] int, or [..., rotary_dim] without; cosines
    in the first half of its columns, sines in the second. Products and sum have the dtype torch
    gives them, so an fp32 ``cos_sin`` rounds once, and one in the dtype of ``x`` rounds every step.
    A position outside [0, n) gives NaN.
    """
    if positions is not None:
        cos_sin = rows_at(cos_sin, positions)
    cos, sin = cos_sin.unsqueeze(-2).chunk(2, dim=-1)
    rotary_dim = cos_sin.shape[-1]
    turning = x[..., :rotary_dim]
    if interleaved:
        x1, x2 = turning[..., ::2], turning[..., 1::2]
    else:
        x1, x2 = turning.chunk(2, dim=-1)
    turned = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    rotated = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((rotated.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def reference(
    q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor,
    cos_sin: Tensor, positions: Tensor | None, eps: float, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`rotate` of the norms of ``q`` and ``k``, which round to their dtype before it."""
    return (
        rotate(plain_norm(q, q_gamma, eps), cos_sin, positions, interleaved),
        rotate(plain_norm(k, k_gamma, eps), cos_sin, positions, interleaved),
    )


def plan(
    q: Tensor, k: Tensor, in_place: bool, cos_sin: Tensor, positions: object, interleaved: bool
) -> Plan:
    """Called with ``(q, k, q_out, k_out, q_gamma, k_gamma, cos_sin, positions), (eps,)``."""
    from gemma_fold.ops import launch
    from gemma_fold.ops.kernels.qk_rms_norm_rope import qk_rms_norm_rope_kernel

    scalars, extra = plan_table(cos_sin, interleaved)
    return launch.plan_heads(qk_rms_norm_rope_kernel, (q, k), in_place, scalars, extra)


def plan_table(cos_sin: Tensor, interleaved: bool) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The step of its rows and their number, and the constants of a kernel that reads them."""
    from gemma_fold.ops import launch

    unit, steps = launch.steps(cos_sin, (checks.row_stride(cos_sin, "cos_sin"),))
    constants = {
        "COS_SIN_UNIT": unit,
        "H2": cos_sin.shape[-1] // 2,
        "NVIDIA": launch.on_nvidia(),
        "INTERLEAVED": interleaved,
    }
    return (*steps, cos_sin.numel() // cos_sin.shape[-1]), constants


def check_rotary(q: Tensor, cos_sin: Tensor, positions: Tensor | None) -> None:
    """``cos_sin`` must hold a row for each token of ``q`` [..., heads, head_dim], or a table."""
    if cos_sin.dtype not in (q.dtype, torch.float32):
        raise TypeError(f"cos_sin must be float32 or {q.dtype} as q is, not {cos_sin.dtype}")
    if cos_sin.device != q.device:
        raise ValueError(f"cos_sin is on {cos_sin.device} but q is on {q.device}")
    lead = list(q.shape[:-2])
    if positions is None:
        if cos_sin.dim() == 0 or list(cos_sin.shape[:-1]) != lead:
            raise ValueError(
                f"cos_sin has shape {list(cos_sin.shape)}; without positions it must be one row "
                f"for each token, {[*lead, 'rotary_dim']}"
            )
    elif cos_sin.dim() != 2 or cos_sin.shape[0] == 0:
        raise ValueError(
            f"cos_sin must be [max_positions, rotary_dim], not {list(cos_sin.shape)}, "
            "to be indexed by positions"
        )
    else:
        _check_positions(positions, lead, q.device)
    if cos_sin.shape[-1] % 2 or not 2 <= cos_sin.shape[-1] <= q.shape[-1]:
        raise ValueError(
            f"cos_sin has {cos_sin.shape[-1]} columns; rotary_dim must be even and at most the "
            f"head_dim of {q.shape[-1]}"
        )


def _check_positions(positions: Tensor, shape: list[int], device: torch.device) -> None:
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions must be int32 or int64, not {positions.dtype}")
    if list(positions.shape) != shape:
        raise ValueError(f"positions must be {shape}, one a token, not {list(positions.shape)}")
    if positions.device != device:
        raise ValueError(f"positions is on {positions.device} but q is on {device}")
    if not positions.is_contiguous():
        raise ValueError("positions must be contiguous")


operator = HeadsOperator(
    "qk_rms_norm_rope",
    reference,
    plan,
    instead="rms_norm and a rotary embedding of its own",
    check_others=check_rotary,
)


def qk_rms_norm_rope(
    q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor,
    cos_sin: Tensor, positions: Tensor | None, eps: float = 1e-6, *, interleaved: bool = False,
) -> None:  # fmt: skip
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
    tensors = (q, k, q_gamma, k_gamma, cos_sin, positions)
    operator.call_in_place(tensors, (eps, interleaved))
