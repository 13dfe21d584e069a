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

from gemma_fold.ops.collectives.workspace import AllReduceWorkspace
from gemma_fold.ops.operators.add_rms_norm import add_rms_norm, add_rms_norm_, add_rms_norm_fp8
from gemma_fold.ops.operators.all_reduce import (
    all_reduce,
    all_reduce_add_rms_norm,
    all_reduce_add_rms_norm_fp8,
    all_reduce_rms_norm_add_rms_norm,
    all_reduce_rms_norm_add_rms_norm_fp8,
)
from gemma_fold.ops.operators.linear import gelu_linear, linear
from gemma_fold.ops.operators.qk_rms_norm import qk_rms_norm
from gemma_fold.ops.operators.qk_rms_norm_rope import qk_rms_norm_rope
from gemma_fold.ops.operators.qk_rms_norm_rope_cache import qk_rms_norm_rope_cache
from gemma_fold.ops.operators.rms_norm import rms_norm, rms_norm_fp8
from gemma_fold.ops.operators.rms_norm_add_rms_norm import (
    rms_norm_add_rms_norm,
    rms_norm_add_rms_norm_,
    rms_norm_add_rms_norm_fp8,
)

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
    "gelu_linear",
    "linear",
    "qk_rms_norm",
    "qk_rms_norm_rope",
    "qk_rms_norm_rope_cache",
    "rms_norm",
    "rms_norm_add_rms_norm",
    "rms_norm_add_rms_norm_",
    "rms_norm_add_rms_norm_fp8",
    "rms_norm_fp8",
]
