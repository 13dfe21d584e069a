"""SGLang's zero-centred norms on gemma-fold's kernels, which take the fp32 gain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemma_fold import ops
from gemma_fold.engines.sglang.all_reduce import attention_group_size, sum_over_attention
from gemma_fold.engines.sglang.norms import GainedNorm, gained_norms
from gemma_fold.ops import AllReduceWorkspace, checks


class NativeNorm(GainedNorm):
    """A zero-centred norm that runs gemma-fold's kernels on its gain.

    Attributes:
        workspace: name of the attention group's all-reduce workspace, or None: one rank.
    """

    native = True
    workspace: str | None = None

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
    ) -> Any:
        """``x``, ``residual``: [..., H]. Returns the norm of ``x``, or of the sum and the sum."""
        if not takes(x, residual):
            return self.stock_forward(x, residual, post_residual_addition)
        if residual is None:
            return rms_norm(x, self.gamma32, self.epsilon)
        if post_residual_addition is not None:
            residual = residual + post_residual_addition
        return ops.add_rms_norm(x, residual, self.gamma32, self.epsilon)

    def stock_forward(self, x: Tensor, residual: Tensor | None, addition: Tensor | None) -> Any:
        """SGLang's own forward; it has the third argument in some of its classes only."""
        rest = (addition,) if addition is not None else ()
        return super().forward(x, residual, *rest)

    def all_reduce_add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        taken = takes(x, residual)
        if taken and self.workspace is not None:
            return ops.all_reduce_add_rms_norm(
                x, residual, self.gamma32, self.workspace, self.epsilon
            )
        # Not SGLang's fused operator, which takes a gain in 16 bits. Its norm alone adds in place.
        summed = sum_over_attention(x)
        fused: tuple[Tensor, Tensor] = self.forward(summed, residual if taken else residual.clone())
        return fused


def takes(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the kernels take these activations."""
    return checks.supports(x) and (residual is None or residual.dtype == x.dtype)


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """The norm of ``x``, [..., H], in the memory layout of ``x``, as elementwise operators give it.

    The code around transposed query and key heads relies on that layout.
    """
    order = checks.memory_order(x)
    rows = x if order is None else x.permute(tuple(order))
    if rows.dim() > 3 or rows.stride(-1) != 1:
        rows = rows.contiguous()
    normed = ops.rms_norm(rows, gamma, eps)
    return normed if order is None else normed.permute(checks.inverse(order))


def share_workspace(model: nn.Module, hidden: int) -> None:
    """Give the norms of rows of `hidden` in `model` an all-reduce workspace, where they need one.

    Collective: every rank builds the same models in the same order.
    """
    for _, norm in gained_norms(model):
        if isinstance(norm, NativeNorm) and norm.gamma32.shape[0] == hidden:
            weight = norm.weight
            norm.workspace = all_reduce_workspace(hidden, weight.dtype, norm.gamma32.device)


def all_reduce_workspace(hidden: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """The workspace of the attention group for rows of `hidden`; None where SGLang reduces better.

    That is for one rank, where batches overlap (they would share the buffers), and on GPUs that do
    not reach each other's memory. Collective where it is new.
    """
    if attention_group_size() == 1 or _batches_overlap():
        return None
    key = (hidden, dtype)
    if key not in _workspaces:
        from sglang.srt.distributed.parallel_state import get_attn_tp_group

        _workspaces[key] = AllReduceWorkspace(
            get_attn_tp_group().device_group, hidden=hidden, dtype=dtype, device=device
        )
    workspace = _workspaces[key]
    return workspace.name if workspace.fused or device.type == "cpu" else None


def _batches_overlap() -> bool:
    from sglang.srt.runtime_context import get_server_args

    settings = get_server_args()
    return any(
        getattr(settings, name, False)
        for name in ("enable_two_batch_overlap", "enable_single_batch_overlap", "enable_pdmux")
    )


_workspaces: dict[tuple[int, torch.dtype], AllReduceWorkspace] = {}
