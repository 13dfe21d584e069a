"""Tiny models of the families that vLLM serves, in sizes that its CPU kernels take."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm_processors import save_processor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny

VOCAB = 512
_WIDER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def _widen(config: dict[str, Any], *, text: bool = True) -> dict[str, Any]:
    wide: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            wide[key] = _widen(value, text=key == "text_config")
        elif text and key in _WIDER:
            wide[key] = _WIDER[key]
        else:
            wide[key] = value
    return wide


def save(model_type: str, folder: Path, seed: int = 0) -> Path:
    """Write a bf16 checkpoint of the family, as it is published, with its processor."""
    original = tiny.CONFIGS[model_type]
    config = {"vocab_size": VOCAB, **_widen(original)}
    if model_type == "gemma3":
        config["vision_config"]["vision_use_head"] = False
    tiny.CONFIGS[model_type] = config
    try:
        tiny.build(model_type, torch.bfloat16, seed).save_pretrained(folder)
    finally:
        tiny.CONFIGS[model_type] = original
    if model_type in ("gemma3", "paligemma"):
        _restore_names(folder / "model.safetensors")
    save_processor(model_type, folder, VOCAB)
    return folder


def _restore_names(file: Path) -> None:
    """The names of the vision tower that published checkpoints have and vLLM reads."""
    tensors = load_file(file)
    old, new = "vision_tower.", "vision_tower.vision_model."
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(renamed, file, {"format": "pt"})
