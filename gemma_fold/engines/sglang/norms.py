"""SGLang's zero-centred norms with their exact gain, and gemma-fold's kernels on it.

`weight` stays what SGLang made it, the raw w: several of its kernels read it themselves and add the
1 in fp32. Beside it lies `gamma32`, fp32 [H], written in the same step and in place, so that CUDA
graphs that captured either stay right. SGLang's own `gemma_weight`, 1 + w rounded to the model's
dtype, is kept in step too, for the paths that still read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.layers.layernorm import Gemma3RMSNorm, GemmaRMSNorm
from torch import Tensor, nn

from gemma_fold import ops
from gemma_fold.engines.weights import fold, is_gamma, unfold
from gemma_fold.engines.workspace import shared_workspace
from gemma_fold.ops import checks

Opt = Tensor | None

_OFFSET = 1.0
#: Attribute of a raw w that comes from a gamma: that gamma, whose last bits w may not hold.
GAMMA = "gemma_fold_gamma"
#: SGLang's classes that multiply by 1 + weight and that gemma-fold has kernels for.
ZERO_CENTRED = (GemmaRMSNorm, Gemma3RMSNorm)


class GainedNorm(nn.Module):
    """A zero-centred norm of SGLang that keeps its gain; made by :func:`adopt`.

    Attributes:
        weight: w in the dtype of the model, [H].
        gamma32: fp32 [H], the gain: 1 + w before w was rounded to that dtype.
        given: whether a weight was ever loaded.
    """

    weight: nn.Parameter
    gamma32: Tensor
    given: bool

    @property
    def epsilon(self) -> float:
        """Added to the mean square."""
        return self.eps if hasattr(self, "eps") else self.variance_epsilon  # type: ignore[return-value]

    def all_reduce_add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor] | None:
        """``x``, [tokens, H], summed over the ranks of an attention and added to ``residual``.

        Returns:
            The norm of the sum, and the sum; None to leave both to SGLang.
        """
        return None

    def load_gain(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        """SGLang's weight loader: `loaded` is fp32 [H, 1], a gamma, or [H], a raw w."""
        if is_gamma(loaded, parameter.shape[0]):
            gamma = loaded.view(-1)
            weight = unfold(gamma, _OFFSET, torch.float32)
        else:
            exact: Tensor | None = getattr(loaded, GAMMA, None)
            gamma, weight = fold(loaded, _OFFSET) if exact is None else exact, loaded
        parameter.data.copy_(weight)
        self.gamma32.copy_(gamma)
        self._refresh_rounded()
        self.given = True

    def follow_weight(self) -> None:
        """Bring the gain in step with a weight that was written past :meth:`load_gain`.

        A gain that already belongs to the weight keeps the bits the weight has no room for.
        """
        weight = self.weight.data.to(self.gamma32.device)
        if not torch.equal(unfold(self.gamma32, _OFFSET, weight.dtype), weight):
            self.gamma32.copy_(fold(weight, _OFFSET))
        self._refresh_rounded()

    def _refresh_rounded(self) -> None:
        rounded = getattr(self, "gemma_weight", None)
        if rounded is not None:
            # Copied first: with CPU offloading the two are on different devices.
            rounded.copy_(self.weight.data).add_(_OFFSET)


def adopt(norm: nn.Module, kind: type[GainedNorm]) -> None:
    """Give the zero-centred `norm` its gain and the methods of `kind`, in place."""
    weight: Any = norm.weight
    # On the device that the model is built for: SGLang may have offloaded the weight already.
    gamma = torch.empty(weight.shape, dtype=torch.float32)
    gamma.copy_(fold(weight.detach(), _OFFSET))
    norm.register_buffer("gamma32", gamma, persistent=False)
    norm.__dict__["given"] = False
    norm.__class__ = derive(kind, type(norm))
    weight.weight_loader = norm.load_gain


def zero_centred_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Norms of `model` that can be adopted, with their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, ZERO_CENTRED) and not isinstance(module, GainedNorm)
    ]


def gained_norms(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adopted norms of `model`, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, GainedNorm):
            yield name, module


def derive(kind: type[GainedNorm], base: type[nn.Module]) -> type[nn.Module]:
    """The class `base` of SGLang with the methods of `kind` before its own, under its own name."""
    if (kind, base) not in _derived:
        body = {"__module__": __name__, "__doc__": base.__doc__}
        _derived[kind, base] = type(base.__name__, (kind, base), body)
    return _derived[kind, base]


_derived: dict[tuple[type, type], type[nn.Module]] = {}


class NativeNorm(GainedNorm):
    """A zero-centred norm that runs gemma-fold's kernels on its gain.

    Attributes:
        workspace: name of the attention group's all-reduce workspace, or None: one rank.
    """

    workspace: str | None = None

    def forward(self, x: Tensor, residual: Opt = None, post_residual_addition: Opt = None) -> Any:
        """``x``, ``residual``: [..., H]. Returns the norm of ``x``, or of the sum and the sum."""
        if not takes(x, residual):
            # SGLang's own forward has the third argument in some of its classes only.
            rest = (post_residual_addition,) if post_residual_addition is not None else ()
            return super().forward(x, residual, *rest)
        if residual is None:
            return rms_norm(x, self.gamma32, self.epsilon)
        if post_residual_addition is not None:
            residual = residual + post_residual_addition
        return ops.add_rms_norm(x, residual, self.gamma32, self.epsilon)

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
    """Give the norms of rows of `hidden` in `model` an all-reduce workspace, if they need one.

    Collective: every rank builds the same models in the same order.
    """
    for _, norm in gained_norms(model):
        if isinstance(norm, NativeNorm) and norm.gamma32.shape[0] == hidden:
            weight = norm.weight
            norm.workspace = all_reduce_workspace(hidden, weight.dtype, norm.gamma32.device)


def all_reduce_workspace(hidden: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """The workspace of the attention group for rows of `hidden`; None if SGLang should reduce.

    That is for one rank, if batches overlap (they would share the buffers), and on GPUs that do
    not reach each other's memory. Collective if it is new.
    """
    if attention_group_size() == 1 or _batches_overlap():
        return None
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    group = get_attn_tp_group()
    name = f"gemma_fold.{group.unique_name}.{hidden}.{dtype}"
    return shared_workspace(name, group.device_group, hidden=hidden, dtype=dtype, device=device)


def _batches_overlap() -> bool:
    from sglang.srt.runtime_context import get_server_args

    settings = get_server_args()
    return any(
        getattr(settings, name, False)
        for name in ("enable_two_batch_overlap", "enable_single_batch_overlap", "enable_pdmux")
    )


def attention_group_size() -> int:
    """Ranks that share one attention."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().attn_tp_size)


def sum_over_attention(x: Tensor) -> Tensor:
    """``x`` summed over the ranks that share one attention, by SGLang."""
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    summed: Tensor = get_attn_tp_group().all_reduce(x)
    return summed
