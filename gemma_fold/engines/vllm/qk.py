"""The norms of q and k in native mode.

Three modes, chosen here and nowhere else:

* fused: one launch norms every q and k head in place, right after their projection. The best where
  each kernel is launched by itself.
* inline: an expression, which a compiler fuses with the rotary embedding that follows.
* separate: one operator for q and one for k, where an adapter may replace the projection.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from vllm.config import CompilationMode
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from gemma_fold import ops
from gemma_fold.engines.known_code import statements_digest
from gemma_fold.engines.mode import requested
from gemma_fold.engines.vllm.norms import InlineNorm, NativeNorm, PassedNorm, adopt
from gemma_fold.engines.vllm.weights import Loader

QkMode = Literal["fused", "inline", "separate"]

VARIABLE = "GEMMA_FOLD_QK"
_CLASSES: dict[QkMode, type[NativeNorm]] = {
    "fused": PassedNorm,
    "inline": InlineNorm,
    "separate": NativeNorm,
}


def choose_qk_mode(vllm_config: Any) -> QkMode:
    """How q and k are normed.

    Raises:
        UsageError: `GEMMA_FOLD_QK` has another value.
    """
    wanted = requested(VARIABLE, _CLASSES)
    for mode in _CLASSES:
        if wanted == mode:
            return mode
    if vllm_config.compilation_config.mode != CompilationMode.NONE:
        return "inline"
    return "separate" if vllm_config.lora_config is not None else "fused"


def adopt_qk_norms(attention: Any, vllm_config: Any, loader: Loader, forward: str) -> int:
    """Turn the q and k norms of `attention` native, in place; how many norms that are.

    `forward` is the digest of the attention that was read; another one keeps vLLM's norms.
    """
    if statements_digest(type(attention).forward) != forward or not all(
        type(getattr(attention, name, None)) is GemmaRMSNorm for name in ("q_norm", "k_norm")
    ):
        return 0
    mode = choose_qk_mode(vllm_config)
    for norm in (attention.q_norm, attention.k_norm):
        adopt(norm, _CLASSES[mode], loader)
    if mode == "fused":
        attention.qkv_proj.register_forward_hook(_QkHook(attention))
    return 2


class _QkHook:
    """Norms the q and k heads in the output of their projection, [tokens, (q, k, v)], in place."""

    def __init__(self, attention: Any) -> None:
        self._heads = attention.num_heads, attention.num_kv_heads
        self._ends = attention.q_size, attention.q_size + attention.kv_size
        self._norms = attention.q_norm, attention.k_norm

    def __call__(self, module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
        qkv = output[0]
        q_heads, k_heads = self._heads
        q_end, k_end = self._ends
        q_norm, k_norm = self._norms
        ops.qk_rms_norm(
            qkv[..., :q_end].view(*qkv.shape[:-1], q_heads, -1),
            qkv[..., q_end:k_end].view(*qkv.shape[:-1], k_heads, -1),
            q_norm.gamma,
            k_norm.gamma,
            q_norm.variance_epsilon,
        )
