"""RMSNorm operators for zero-centred norms (Gemma, Qwen3-Next, Qwen3.5), from gemma-fold.

``rms_norm_zero_centered`` takes the weight ``w`` of a model as it is; all others take a folded gain
``gamma = 1 + w``, fp32 ``[H]``. Activations are bf16, fp16 or fp32, ``[..., H]`` with ``H`` up to
16,384. CUDA tensors run Triton kernels, CPU tensors plain torch.
"""

from __future__ import annotations

from gemma_fold.ops.operators.add_rms_norm import add_rms_norm, add_rms_norm_, add_rms_norm_fp8
from gemma_fold.ops.operators.qk_rms_norm import qk_rms_norm
from gemma_fold.ops.operators.qk_rms_norm_rope import qk_rms_norm_rope
from gemma_fold.ops.operators.rms_norm import rms_norm, rms_norm_fp8
from gemma_fold.ops.operators.rms_norm_add_rms_norm import (
    rms_norm_add_rms_norm,
    rms_norm_add_rms_norm_,
    rms_norm_add_rms_norm_fp8,
)
from gemma_fold.ops.operators.rms_norm_zero_centered import rms_norm_zero_centered
from hub_kernel import layers

__all__ = [
    "add_rms_norm",
    "add_rms_norm_",
    "add_rms_norm_fp8",
    "layers",
    "qk_rms_norm",
    "qk_rms_norm_rope",
    "rms_norm",
    "rms_norm_add_rms_norm",
    "rms_norm_add_rms_norm_",
    "rms_norm_add_rms_norm_fp8",
    "rms_norm_fp8",
    "rms_norm_zero_centered",
]
