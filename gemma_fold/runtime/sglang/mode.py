"""Which kernels the norms of a model run: SGLang's own, or gemma-fold's."""

from __future__ import annotations

import enum

from torch import nn

from gemma_fold.runtime.attach.setting import wanted
from gemma_fold.runtime.sglang.norms import GainedNorm


class Mode(enum.Enum):
    """`STOCK`: SGLang's kernels on the raw w. `NATIVE`: gemma-fold's on the fp32 gain."""

    STOCK = "stock"
    NATIVE = "native"

    def norm_class(self, norm: nn.Module) -> type[GainedNorm]:
        """What `norm` becomes. One whose class has a forward of its own keeps SGLang's kernels."""
        from gemma_fold.runtime.sglang.all_reduce import StockNorm
        from gemma_fold.runtime.sglang.native import NativeNorm

        replaced = type(norm).__module__ != "sglang.srt.layers.layernorm"
        return StockNorm if self is Mode.STOCK or replaced else NativeNorm


def mode_of(folded: bool) -> Mode | None:
    """The mode of a model, or None where it is left alone.

    A folded one runs stock unless the environment variable GEMMA_FOLD says native: on GPUs native
    mode has not been measured in SGLang. An original is left alone unless it says native: it is
    then folded as it loads. Raises UsageError for any other value.
    """
    value = wanted()
    if value in ("native", "require"):
        return Mode.NATIVE
    return Mode.STOCK if folded else None
