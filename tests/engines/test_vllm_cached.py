"""A Gemma 3 attention of vLLM whose KV cache is written by the operator that norms and rotates.

The attention, its norms, the forward context, the graph and where it is split are vLLM's. The CPU
build has no FlashAttention, so a small backend writes the same layout and attends in plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from local_server import free_port
from torch import Tensor

pytestmark = pytest.mark.engine
TOKENS, HEADS, KV_HEADS, SIZE, PAGE, BLOCKS = 9, 4, 2, 64, 4, 8
HIDDEN = 96
SLOTS = [5, 6, 7, 20, 21, 22, 23, -1, -1]  # two tokens are padding
ALIVE = 7


class PlainImpl:
    """Writes and reads [blocks, heads, places, keys and values], as FlashAttention's backend."""

    supports_quant_query_input = False

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor
    ) -> None:
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                kv_cache[slot // PAGE, :, slot % PAGE, :SIZE] = key[token]
                kv_cache[slot // PAGE, :, slot % PAGE, SIZE:] = value[token]

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        metadata: Any, output: Tensor, **others: Any,
    ) -> Tensor:  # fmt: skip
        held = torch.stack([kv_cache[s // PAGE, :, s % PAGE] for s in SLOTS[:ALIVE]], dim=1)
        k, v = held.repeat_interleave(HEADS // KV_HEADS, dim=0).split(SIZE, dim=-1)
        q = query[:ALIVE].transpose(0, 1)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        output.zero_()
        output[:ALIVE] = attended.transpose(0, 1)
        return output


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    config = pytest.importorskip("vllm.config")
    import vllm_models
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs

    folder = vllm_models.save("gemma3_text", tmp_path_factory.mktemp("model"))
    found = EngineArgs(model=str(folder), dtype="float32").create_engine_config()
    with config.set_current_vllm_config(found):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
        initialize_model_parallel()
        yield found
        cleanup_dist_env_and_memory()


def attention_of(vllm_config: Any, name: str) -> Any:
    from transformers import Gemma3TextConfig
    from vllm.model_executor.models.gemma3 import Gemma3Attention

    config = Gemma3TextConfig(
        hidden_size=HIDDEN, head_dim=SIZE, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        num_hidden_layers=1, max_position_embeddings=128, layer_types=["full_attention"],
    )  # fmt: skip
    torch.manual_seed(7)
    attention = Gemma3Attention(
        config, HIDDEN, HEADS, KV_HEADS, SIZE, 128, prefix=f"model.layers.0.{name}"
    )
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for linear in (attention.qkv_proj, attention.o_proj):
        linear.quant_method.process_weights_after_loading(linear)
    attention.attn.impl = PlainImpl()
    attention.attn.kv_cache = torch.zeros(BLOCKS, KV_HEADS, PAGE, 2 * SIZE)
    return attention.requires_grad_(False)


def make_cached(attention: Any, vllm_config: Any) -> Any:
    from gemma_fold.engines.vllm import cached, norms

    for norm in (attention.q_norm, attention.k_norm):
        norms.adopt(norm, norms.PassedNorm, lambda param, loaded: None)
    cached.take_over(attention, vllm_config)
    return attention


def run(attention: Any, vllm_config: Any, slots: Any = SLOTS, forward: Any = None) -> Tensor:
    from vllm.forward_context import set_forward_context

    torch.manual_seed(8)
    hidden, positions = torch.randn(TOKENS, HIDDEN), torch.arange(TOKENS) + 3
    name = attention.attn.layer_name
    mapping = {name: torch.tensor(slots)} if slots is not None else {}
    with set_forward_context({name: None}, vllm_config, slot_mapping=mapping):
        return (attention if forward is None else forward)(positions, hidden)


def test_says_what_vllms_own_attention_says(vllm_config: Any) -> None:
    stock = attention_of(vllm_config, "stock")
    ours = make_cached(attention_of(vllm_config, "ours"), vllm_config)
    want, got = run(stock, vllm_config), run(ours, vllm_config)
    assert want[:ALIVE].abs().max() > 0.01
    torch.testing.assert_close(got[:ALIVE], want[:ALIVE], rtol=1e-4, atol=1e-5)
    cache = stock.attn.kv_cache
    torch.testing.assert_close(ours.attn.kv_cache, cache, rtol=1e-4, atol=1e-5)
    assert cache.any(-1).sum() == ALIVE * KV_HEADS
    assert "gemma_fold::cached_attention_inputs" in vllm_config.compilation_config.splitting_ops


def test_a_trial_run_without_slots_writes_nothing(vllm_config: Any) -> None:
    ours = make_cached(attention_of(vllm_config, "trial"), vllm_config)
    run(ours, vllm_config, slots=None)
    assert not ours.attn.kv_cache.any()


def test_the_graph_is_split_where_vllm_splits_it(vllm_config: Any) -> None:
    """Around both operators at once: what compiles is before and behind them."""
    from vllm.compilation.backends import split_graph

    ours = make_cached(attention_of(vllm_config, "split"), vllm_config)
    want = run(ours, vllm_config)
    ours.attn.kv_cache.zero_()
    splits = [
        "vllm::unified_attention_with_output",
        *vllm_config.compilation_config.splitting_ops,
    ]
    pieces: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        whole, items = split_graph(graph, splits)
        pieces.extend(items)
        return whole

    torch._dynamo.reset()
    ours.attn.use_direct_call = False
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    assert torch.equal(run(ours, vllm_config, forward=compiled), want)
    assert [piece.is_splitting_graph for piece in pieces] == [False, True, False]
    called = [n.target for n in pieces[1].graph.graph.nodes if n.op == "call_function"]
    assert [str(target) for target in called] == [
        "gemma_fold.cached_attention_inputs",
        "vllm.unified_attention_with_output",
    ]


def test_another_backend_keeps_its_own_write(vllm_config: Any) -> None:
    """With the reason: this backend's code is not FlashAttention's."""
    from vllm.model_executor.layers.attention.attention import Attention

    from gemma_fold.engines.vllm import cached, norms

    attention = attention_of(vllm_config, "other")
    assert "writes the cache in its own way" in cached.problem(attention, vllm_config)
    settings = SimpleNamespace(
        compilation_config=vllm_config.compilation_config,
        lora_config=None,
        parallel_config=vllm_config.parallel_config,
    )
    read = norms.statements_digest(type(attention).forward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_FOLD_QK", "cached")
        found = norms.adopt_qk_norms(attention, settings, lambda param, loaded: None, read)
    assert found == (2, norms._uncached_qk_mode(settings))
    assert type(attention.attn) is Attention
    assert type(attention.q_norm) is norms._CLASSES[norms._uncached_qk_mode(settings)]


@pytest.mark.parametrize("how", ("decode", "prefill"))
def test_context_parallelism_keeps_vllms_write(how: str, vllm_config: Any) -> None:
    """There k is attended to as it is given, beside the cache."""
    from gemma_fold.engines.vllm import cached

    parallel = SimpleNamespace(**{f"{how}_context_parallel_size": 2})
    settings = SimpleNamespace(
        compilation_config=vllm_config.compilation_config,
        lora_config=None,
        parallel_config=parallel,
    )
    attention = attention_of(vllm_config, f"{how}_parallel")
    assert "context parallelism" in cached.problem(attention, settings)


def test_the_write_of_flash_attention_is_the_one_that_was_read(vllm_config: Any) -> None:
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    from gemma_fold.engines.known_code import statements_digest
    from gemma_fold.engines.vllm import cached

    assert statements_digest(FlashAttentionImpl.do_kv_cache_update) == cached._WRITE
    assert statements_digest(FlashAttentionImpl.forward) in cached._READS
    assert statements_digest(Attention.forward) in cached._FORWARDS
