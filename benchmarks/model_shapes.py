"""Configs of the models that the benchmarks of engines time; their weights are random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


_GEMMA_27B: dict[str, Any] = {
    **_COMMON,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


def _gemma3_27b(layers: int = 62) -> dict[str, Any]:
    return {
        **_GEMMA_27B,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": layers,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
        "layer_types": [_every(i, 6, "full_attention", "sliding_attention") for i in range(layers)],
        "rope_parameters": {
            "sliding_attention": _ROPE,
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    }


def _gemma2_27b(layers: int = 46) -> dict[str, Any]:
    return {
        **_GEMMA_27B,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": layers,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 144,
        "sliding_window": 4096,
        "layer_types": [_every(i, 2, "full_attention", "sliding_attention") for i in range(layers)],
        "rope_parameters": _ROPE,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }


def _gemma3_4b(layers: int = 34) -> dict[str, Any]:
    small = {"hidden_size": 2560, "intermediate_size": 10240, "query_pre_attn_scalar": 256}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    return {**_gemma3_27b(layers), **small, **heads}


def _gemma3_12b(layers: int = 48) -> dict[str, Any]:
    small = {"hidden_size": 3840, "intermediate_size": 15360, "query_pre_attn_scalar": 256}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
    return {**_gemma3_27b(layers), **small, **heads}


def _gemma2_9b(layers: int = 42) -> dict[str, Any]:
    small = {"hidden_size": 3584, "intermediate_size": 14336, "query_pre_attn_scalar": 256}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256}
    return {**_gemma2_27b(layers), **small, **heads}


def _qwen3_5_like(layers: int = 64) -> dict[str, Any]:
    text = {
        **_COMMON,
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": layers,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "layer_types": [_every(i, 4, "full_attention", "linear_attention") for i in range(layers)],
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": {
            **_ROPE,
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": False,
    }
    # Served without its images, as `--language-model-only` does: vLLM 0.26 has no text-only class.
    return {
        "dtype": "bfloat16",
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text,
        "vision_config": {"model_type": "qwen3_5", "depth": 1, "out_hidden_size": 5120},
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
        "tie_word_embeddings": False,
    }


def _every(index: int, period: int, last: str, others: str) -> str:
    return last if index % period == period - 1 else others


_SHAPES = {
    "gemma3-4b": _gemma3_4b,
    "gemma3-12b": _gemma3_12b,
    "gemma2-9b": _gemma2_9b,
    "gemma3-27b": _gemma3_27b,
    "gemma2-27b": _gemma2_27b,
    "qwen3.5-like": _qwen3_5_like,
}
NAMES = tuple(_SHAPES)
#: A width that a CPU can run: for trying the benchmark out.
_SMALL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def config(name: str, layers: int | None, *, small: bool) -> dict[str, Any]:
    """`config.json` of the shape, with another number of layers or a CPU's width if wanted."""
    shape = _SHAPES[name](layers) if layers else _SHAPES[name]()
    if small:
        text = shape.get("text_config", shape)
        text.update({k: v for k, v in _SMALL.items() if k in text})
        if "mrope_section" in text["rope_parameters"]:
            text["head_dim"] = 256  # what the sections add up to
    return shape


def write(config: dict[str, Any], work: Path) -> Path:
    """A folder in `work` with this `config.json`, for an engine that makes the weights up."""
    folder = work / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder
