"""q and k norm, rotary embedding and the KV cache's write of a Gemma 3 layer, in one operator.

vLLM writes the cache in `Attention.forward`, by an operator that runs between the compiled parts of
a model and before the one that attends. Here that place has an operator which norms and rotates,
too: the norms and the rotary embedding pass on what they are given, and `k` takes the positions
along to the attention. The layer's own forward stays. What attends reads k and v from the cache,
so neither is normed where it is; FlashAttention is the backend in which that was read.

vLLM names the slots of a step in its forward context, in a tensor that keeps its place and is
padded with -1, so that CUDA graphs may hold the operator.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm
from torch import Tensor, nn
from vllm.config import CompilationMode
from vllm.model_executor.layers.attention.attention import Attention, get_attention_context
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.utils import torch_utils

from gemma_fold import ops
from gemma_fold.engines.known_code import statements_digest
from gemma_fold.ops.operators.base import LIBRARY

OPERATOR = "cached_attention_inputs"
STOCK_OPERATOR = "vllm::unified_kv_cache_update"
#: Of vLLM 0.26, 0.32 and 0.33: what of `Attention.forward` is done here instead.
_FORWARDS = (
    "7a82e96a478898384a5350cafd31dbb53f2ad03ae200a7601eacbd714f68d531",
    "6ead5c4a47422dc92b27c526eb2c26f681aebaa759a19bfa414eb1f2891d572c",
    "4d38f42b46b2b4badb46a6e70c11b60bd6708f6f0633e52d9170251e5b532aca",
)
#: Of all three: how `FlashAttentionImpl` writes its cache, [blocks, heads, places, k and v].
_WRITE = "03a920c0caae20dad8c02109ac2072bd66c9f35251142f06d1f7044f5e9203d5"
#: Of vLLM 0.26, and of 0.32 and 0.33: how it attends, to k in the cache unless it encodes or the
#: context is parallel.
_READS = (
    "57ab48bbf68cc7ddc495389f6eab0ab52d8a73df09b2657e8f858d54adf608c1",
    "78e82cb0de81ee69d6129028c83d4e47338ecfb7f7b21ffee256f64624c5d2cc",
)


def problem(attention: Any, vllm_config: Any) -> str:
    """Why `attention` keeps vLLM's write of the cache; empty if it need not."""
    attn, rotary = attention.attn, attention.rotary_emb
    parallel = vllm_config.parallel_config
    contexts = "decode_context_parallel_size", "prefill_context_parallel_size"
    if any(getattr(parallel, name, 1) > 1 for name in contexts):
        return "under context parallelism, attending reads k itself, too"
    if type(attn) is not Attention or attn.attn_type != "decoder":
        return f"its attention is {type(attn).__name__}, of type {attn.attn_type}"
    if statements_digest(Attention.forward) not in _FORWARDS:
        return f"the attention of vLLM {vllm.__version__} is not known"
    if statements_digest(getattr(type(attn.impl), "do_kv_cache_update", None)) != _WRITE:
        return f"{attn.attn_backend.get_name()} writes the cache in its own way"
    if statements_digest(type(attn.impl).forward) not in _READS:
        return f"how {type(attn.impl).__name__} of vLLM {vllm.__version__} attends is not known"
    if attn.attn_backend.forward_includes_kv_cache_update or attn.kv_sharing_target_layer_name:
        return "its attention writes the cache itself, or shares another layer's"
    if attn.kv_cache_torch_dtype != rotary.cos_sin_cache.dtype or attn.query_quant is not None:
        return f"the KV cache is {attn.kv_cache_dtype}"
    if getattr(attn, "calculate_kv_scales", False):
        return "scales of the KV cache are to be found"
    if not isinstance(rotary, RotaryEmbedding) or any(
        getattr(type(rotary), name) is not getattr(RotaryEmbedding, name)
        for name in ("forward_native", "forward_cuda")
    ):
        return f"{type(rotary).__name__} is not a plain rotary embedding"
    if vllm_config.lora_config is not None:
        return "an adapter may replace the projection"
    return _split_problem(vllm_config.compilation_config)


def _split_problem(compilation: Any) -> str:
    """Why the operator may not stand where vLLM's write of the cache stands."""
    if compilation.mode == CompilationMode.NONE:
        return ""
    if compilation.use_inductor_graph_partition:
        return "Inductor splits the graph"
    if STOCK_OPERATOR not in (compilation.splitting_ops or ()):
        return "the graph is not split at the KV cache's write"
    return ""


def take_over(attention: Any, vllm_config: Any) -> None:
    """Let the attention of a layer norm, rotate and cache; its q and k norms must pass on."""
    splits = vllm_config.compilation_config.splitting_ops
    name = f"gemma_fold::{OPERATOR}"
    if splits is not None and name not in splits:
        splits.append(name)
    attn = attention.attn
    attn.__class__ = CachedAttention
    attn.inputs = attention.q_norm, attention.k_norm, attention.rotary_emb
    attention.rotary_emb = PassedRotary()


class PassedRotary(nn.Module):
    """A rotary embedding that is done by the attention: `k` takes the positions there."""

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Any]:
        return q, (k, positions)


class CachedAttention(Attention):  # type: ignore[misc]
    """vLLM's attention after the operator that norms, rotates and caches.

    Attributes:
        inputs: the norms of q and k, and the rotary embedding; a tuple, so not submodules.
    """

    inputs: tuple[Any, Any, Any]

    def forward(self, query: Tensor, key: Any, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not args and not kwargs
        key, positions = key
        q_norm, k_norm, rotary = self.inputs
        # Everything before both operators, so that no piece of the graph lies between them.
        output = query.new_empty((query.shape[0], self.num_heads, self.head_size_v))
        query = query.view(-1, self.num_heads, self.head_size)
        key = key.view(-1, self.num_kv_heads, self.head_size)
        value = value.view(-1, self.num_kv_heads, self.head_size_v)
        layer = torch_utils._encode_layer_name(self.layer_name)
        gammas = q_norm.gamma, k_norm.gamma
        table = rotary.cos_sin_cache
        cached = torch.ops.gemma_fold.cached_attention_inputs(
            query, key, value, *gammas, table, positions, q_norm.variance_epsilon,
            not rotary.is_neox_style, layer,
        )  # fmt: skip
        torch.ops.vllm.unified_attention_with_output(
            query, key, value, output, layer, kv_cache_dummy_dep=cached
        )
        return output.view(-1, self.num_heads * self.head_size_v)


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_gamma: torch.Tensor,
    k_gamma: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    eps: float,
    interleaved: bool,
    layer_name: str,
) -> torch.Tensor:
    """Norms and rotates `query` in place, and caches; returns what attending has to wait for."""
    name = torch_utils._resolve_layer_name(layer_name)
    _, layer, kv_cache, slots = get_attention_context(name)
    if slots is None:  # a trial run, before there is a cache
        apart = query, key.clone(), q_gamma, k_gamma, cos_sin, positions
        ops.qk_rms_norm_rope(*apart, eps, interleaved=interleaved)
    else:
        keys, values = kv_cache.transpose(1, 2).split(layer.head_size, dim=-1)
        ops.qk_rms_norm_rope_cache(
            query, key, value, q_gamma, k_gamma, cos_sin, positions, keys, values, slots, eps,
            interleaved=interleaved,
        )  # fmt: skip
    return query.new_empty(0)


def _fake(query: Tensor, *others: object) -> Tensor:
    return query.new_empty(0)


# vLLM's own type of a layer's name: with some versions of torch it is not part of the graph.
_run.__annotations__["layer_name"] = torch_utils.LayerNameType
torch_utils.direct_register_custom_op(
    OPERATOR, _run, mutates_args=["query"], fake_impl=_fake, target_lib=LIBRARY
)
