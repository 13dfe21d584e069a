"""SGLang's zero-centred norms with their exact gain beside the weight.

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

from gemma_fold.engines import arithmetic
from gemma_fold.errors import CheckpointError

_OFFSET = 1.0
#: SGLang's classes that multiply by 1 + weight and that gemma-fold has kernels for.
ZERO_CENTRED = (GemmaRMSNorm, Gemma3RMSNorm)


class GainedNorm(nn.Module):
    """A zero-centred norm of SGLang that keeps its gain; made by :func:`adopt`.

    Attributes:
        weight: w in the dtype of the model, [H].
        gamma32: fp32 [H], the gain: 1 + w before w was rounded to that dtype.
        given: whether a weight was ever loaded.
        native: whether it runs on the gain alone.
    """

    native = False

    weight: nn.Parameter
    gamma32: Tensor
    given: bool

    @property
    def epsilon(self) -> float:
        """Added to the mean square."""
        return self.eps if hasattr(self, "eps") else self.variance_epsilon  # type: ignore[return-value]

    def all_reduce_add_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor] | None:
        """``x``, [tokens, H], summed over the ranks of an attention and added to ``residual``.

        Returns the norm of that and that, or None to leave it to SGLang.
        """
        return None

    def load_gain(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        """SGLang's weight loader: `loaded` is fp32 [H, 1], a gamma, or [H], a raw w."""
        if loaded.shape == (*parameter.shape, 1) and loaded.dtype == torch.float32:
            gamma = loaded.reshape(parameter.shape)
            weight = arithmetic.unfold(gamma, _OFFSET, torch.float32)
        elif loaded.shape == parameter.shape:
            gamma, weight = arithmetic.fold(loaded, _OFFSET), loaded
        else:
            raise CheckpointError(
                f"a norm weight of shape {list(parameter.shape)} cannot take {loaded.dtype} "
                f"{list(loaded.shape)}; send w as [H], or gamma as float32 [H, 1]"
            )
        parameter.data.copy_(weight)
        self.gamma32.copy_(gamma)
        self._refresh_rounded()
        self.given = True

    def follow_weight(self) -> None:
        """Bring the gain in step with a weight that was written past :meth:`load_gain`.

        A gain that already belongs to the weight keeps the bits the weight has no room for.
        """
        weight = self.weight.data.to(self.gamma32.device)
        if not torch.equal(arithmetic.unfold(self.gamma32, _OFFSET, weight.dtype), weight):
            self.gamma32.copy_(arithmetic.fold(weight, _OFFSET))
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
    gamma.copy_(arithmetic.fold(weight.detach(), _OFFSET))
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
