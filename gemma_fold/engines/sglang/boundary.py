"""Native norms keep out of SGLang's fusions that read the gain rounded to the model's dtype.

SGLang's fused all-reduces at the edges of a layer (FlashInfer's MNNVL kernels, its own push plane,
AMD's with a quantized output) take `gemma_weight` for the gain. Every one of them may decline, and
SGLang then sums, adds and norms apart, which runs the norm of the module. Stock norms are fused as
ever, with a `gemma_weight` that is in step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from gemma_fold.engines.sglang.norms import NativeNorm

_EDGES = "sglang.srt.layers.layer_boundary"
#: Functions that decline by None, or what is false; which of them there are depends on the version.
DECLINING = (
    f"{_EDGES}.fusions.norm.fused_norm_gamma",
    f"{_EDGES}.fusions.cutedsl._fused_norm_gamma",
    f"{_EDGES}.fusions.cutedsl.CuteDSLFusion._eligible",
    f"{_EDGES}.fusions.cutedsl.CuteDSLFusion._common_eligible",
    "sglang.srt.layers.layernorm._forward_with_allreduce_fusion_quant_per_group",
)

_log = logging.getLogger("sglang.gemma_fold")


def decline(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around those functions: None if a norm among the arguments, or of a plan, is native."""
    given = (*args, *kwargs.values())
    norms = (*given, *(getattr(one, "norm", None) for one in given))
    if any(isinstance(norm, NativeNorm) for norm in norms):
        _say_declined()
        return None
    return original(*args, **kwargs)


@cache
def _say_declined() -> None:
    _log.warning(
        "gemma-fold: SGLang's fusions at the edges of a layer read gains in 16 bits; native norms "
        "run without them"
    )
