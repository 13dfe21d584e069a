"""Which modules of a running model give a row other bits when other rows are beside it.

Hooks remember, for each module, what every row became. A row that comes by again, in whatever
batch, must become the same.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn


class RowProbe:
    """Of norms, linear layers and activations, whose output rows depend on their own row alone.

    Attributes:
        again: by kind, how many rows came by again.
        changed: by kind, how many of these became something else.
    """

    def __init__(self, model: nn.Module) -> None:
        self.again: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self._seen: dict[tuple[str, bytes], bytes] = {}
        self._given: dict[str, list[bytes]] = {}
        for name, module in model.named_modules():
            kind = _kind(module)
            if kind:
                self._watch(name, kind, module)

    def _watch(self, name: str, kind: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._given[name] = _rows([*args, *kwargs.values()])

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            for given, made in zip(self._given.pop(name), _rows(outputs), strict=True):
                known = self._seen.setdefault((name, given), made)
                if known is not made:
                    self.again[kind] += 1
                    self.changed[kind] += known != made

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)

    def found(self) -> dict[str, list[int]]:
        """By kind: rows that came by again, and how many of them became something else."""
        return {kind: [self.again[kind], self.changed[kind]] for kind in sorted(self.again)}


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    for kind in ("Norm", "Linear", "AndMul"):
        if kind in name:
            return kind
    return ""


def _rows(values: Any) -> list[bytes]:
    """The bytes of each row of all tensors of `values` together, [..., H] each."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    flat = [t.detach().reshape(-1, t.shape[-1]).contiguous().view(torch.uint8) for t in tensors]
    return [row.numpy().tobytes() for row in torch.cat(flat, dim=1)]
