"""Checkpoint folders to measure on: Gemma 3 shapes with real bytes, and a huge sparse Qwen3.5.

python -m benchmarks.trees gemma OUT --size-gb 4 --shards 8
python -m benchmarks.trees qwen OUT
"""

import argparse
import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma_fold.checkpoint.header import TensorEntry, render_header

ITEMSIZE = 2  # everything here is bfloat16
Tensor = tuple[str, tuple[int, ...]]
Shard = list[Tensor]

GEMMA = {  # google/gemma-3-4b, the language model
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
}
QWEN: dict[str, Any] = {  # Qwen/Qwen3.5-397B-A17B, the language model; experts stored one by one
    "hidden_size": 4096,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "num_experts": 512,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "vocab_size": 248320,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 15,
}


def write_gemma(out: Path, size_gb: float, shards: int) -> None:
    """A Gemma 3 text model of about `size_gb` 10^9 bytes: real shapes, as many layers as fit.

    Weights are noise that repeats, norm weights are normally distributed, all of them bfloat16.
    """
    embedding, final = ("model.embed_tokens.weight", (262208, 2560)), ("model.norm.weight", (2560,))
    left = size_gb * 1e9 - _bytes(embedding)
    layers = max(1, round(left / sum(_bytes(t) for t in _gemma_layer(0))))
    tensors = [embedding, *(t for i in range(layers) for t in _gemma_layer(i)), final]
    config = {"model_type": "gemma3_text", "num_hidden_layers": layers, **GEMMA}
    architecture = ["Gemma3ForCausalLM"]
    _write(out, {"architectures": architecture, **config}, _split(tensors, shards), sparse=False)


def write_qwen(out: Path, shards: int = 94) -> None:
    """A Qwen3.5-397B of about 800 GB in sparse files: real headers, no data."""
    text = {"model_type": "qwen3_5_moe_text", **QWEN}
    architecture = ["Qwen3_5MoeForConditionalGeneration"]
    config = {"architectures": architecture, "model_type": "qwen3_5_moe", "text_config": text}
    _write(out, config, _split(list(_qwen_tensors()), shards), sparse=True)


def _gemma_layer(layer: int) -> Iterator[Tensor]:
    hidden, inner, head = 2560, 10240, 256
    shapes = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, inner),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "post_attention_layernorm": (hidden,),
        "post_feedforward_layernorm": (hidden,),
        "pre_feedforward_layernorm": (hidden,),
        "self_attn.k_norm": (head,),
        "self_attn.k_proj": (4 * head, hidden),
        "self_attn.o_proj": (hidden, 8 * head),
        "self_attn.q_norm": (head,),
        "self_attn.q_proj": (8 * head, hidden),
        "self_attn.v_proj": (4 * head, hidden),
    }
    return ((f"model.layers.{layer}.{name}.weight", shape) for name, shape in shapes.items())


def _qwen_tensors() -> Iterator[Tensor]:
    hidden, root = 4096, "model.language_model"
    yield f"{root}.embed_tokens.weight", (248320, hidden)
    for layer, kind in enumerate(QWEN["layer_types"]):
        prefix = f"{root}.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        attention = _qwen_full if kind == "full_attention" else _qwen_linear
        for name, shape in attention(hidden).items():
            yield f"{prefix}.{name}", shape
        for expert in range(512):
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (hidden, 1024)
            yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", (1024, hidden)
            yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", (1024, hidden)
        yield f"{prefix}.mlp.gate.weight", (512, hidden)
        yield f"{prefix}.mlp.shared_expert.down_proj.weight", (hidden, 1024)
        yield f"{prefix}.mlp.shared_expert.gate_proj.weight", (1024, hidden)
        yield f"{prefix}.mlp.shared_expert.up_proj.weight", (1024, hidden)
        yield f"{prefix}.mlp.shared_expert_gate.weight", (1, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield f"{root}.norm.weight", (hidden,)
    yield "lm_head.weight", (248320, hidden)


def _qwen_full(hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        "self_attn.q_proj.weight": (2 * 32 * 256, hidden),
        "self_attn.k_proj.weight": (2 * 256, hidden),
        "self_attn.v_proj.weight": (2 * 256, hidden),
        "self_attn.o_proj.weight": (hidden, 32 * 256),
        "self_attn.q_norm.weight": (256,),
        "self_attn.k_norm.weight": (256,),
    }


def _qwen_linear(hidden: int) -> dict[str, tuple[int, ...]]:
    keys, values, heads = 16 * 128, 64 * 128, 64
    return {
        "linear_attn.A_log": (heads,),
        "linear_attn.conv1d.weight": (2 * keys + values, 1, 4),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.in_proj_a.weight": (heads, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.in_proj_qkv.weight": (2 * keys + values, hidden),
        "linear_attn.in_proj_z.weight": (values, hidden),
        "linear_attn.norm.weight": (128,),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor[1]) * ITEMSIZE


def _split(tensors: list[Tensor], count: int) -> list[Shard]:
    """`count` shards of about the same size, in order."""
    total, done = sum(map(_bytes, tensors)), 0
    shards: list[Shard] = [[] for _ in range(count)]
    for tensor in tensors:
        shards[min(count - 1, done * count // total)].append(tensor)
        done += _bytes(tensor)
    return [shard for shard in shards if shard]


def _write(out: Path, config: dict[str, Any], shards: list[Shard], *, sparse: bool) -> None:
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}, indent=2))
    noise = b"" if sparse else random.Random(0).randbytes(2**26)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(out / name, shard, noise)
        weight_map |= {tensor: name for tensor, _ in shard}
    size = sum(_bytes(tensor) for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_shard(path: Path, shard: Shard, noise: bytes) -> None:
    entries, position = [], 0
    for name, shape in shard:
        end = position + math.prod(shape) * ITEMSIZE
        entries.append(TensorEntry(name, "BF16", shape, position, end))
        position = end
    raw = render_header(entries, {"format": "pt"})
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        if noise:
            for entry in entries:
                _write_tensor(file.fileno(), 8 + len(raw) + entry.start, entry, noise)
        else:
            file.truncate(8 + len(raw) + position)


def _write_tensor(fd: int, offset: int, entry: TensorEntry, noise: bytes) -> None:
    data = noise
    if len(entry.shape) == 1:  # bfloat16 by truncation
        weights = np.random.default_rng(entry.start).standard_normal(entry.shape, np.float32)
        data = (weights.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    left = entry.end - entry.start
    while left:
        written = os.pwrite(fd, memoryview(data)[:left], offset)
        offset, left = offset + written, left - written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["gemma", "qwen"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size-gb", type=float, default=4)
    parser.add_argument("--shards", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.model == "gemma":
        write_gemma(arguments.out, arguments.size_gb, arguments.shards)
    else:
        write_qwen(arguments.out)
