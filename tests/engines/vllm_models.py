"""Tiny models of the families that vLLM serves, in sizes that its CPU kernels take."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm_processors import save_processor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
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
#: Where a vision tower hands over to the language model.
_OUT: dict[str, Any] = {"projection_dim": 64, "out_hidden_size": 64}


def _widen(config: dict[str, Any], *, text: bool = True) -> dict[str, Any]:
    wide: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            wide[key] = _widen(value, text=key == "text_config")
        elif key in _OUT:
            wide[key] = _OUT[key]
        elif text and key in _WIDER:
            wide[key] = _WIDER[key]
        else:
            wide[key] = value
    return wide


def save(model_type: str, folder: Path, seed: int = 0, **values: Any) -> Path:
    """Write a bf16 checkpoint of the family, as it is published, with its processor.

    `values` go to its config.
    """
    original = tiny.CONFIGS[model_type]
    config = {"vocab_size": VOCAB, **_widen(original), **values}
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


def add_draft(folder: Path) -> None:
    """Give a tiny dense Qwen3.5 the tensors of a layer that predicts one token more."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    attention = next(name for name in tensors if name.endswith("self_attn.q_norm.weight"))
    layer = attention.removesuffix("self_attn.q_norm.weight")
    torch.manual_seed(2)
    draft = {
        name.replace(layer, "mtp.layers.0."): _like(tensor)
        for name, tensor in tensors.items()
        if name.startswith(layer)
    }
    norm = tensors["model.norm.weight"]
    for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        draft[f"mtp.{name}.weight"] = _like(norm)
    draft["mtp.fc.weight"] = 0.05 * torch.randn(len(norm), 2 * len(norm), dtype=norm.dtype)
    save_file({**tensors, **draft}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return (torch.randn_like(tensor) * tensor.float().std()).to(tensor.dtype)


def save_adapter(folder: Path, original: Path, *, norms: bool = False) -> Path:
    """A LoRA adapter of a tiny Gemma 3's attention, with a trained norm if wanted."""
    config = json.loads((original / "config.json").read_text())
    torch.manual_seed(3)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name in ("q_proj", "o_proj"):
            weight = f"model.layers.{layer}.self_attn.{name}.weight"
            rows, columns = load_file(original / "model.safetensors")[weight].shape
            prefix = f"base_model.model.{weight.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, columns)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 8)
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "o_proj"],
        "bias": "none",
    }
    if norms:
        values["modules_to_save"] = ["input_layernorm"]
        norm = "base_model.model.model.layers.0.input_layernorm.weight"
        tensors[norm] = torch.zeros(config["hidden_size"])
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def quantize(source: Path, folder: Path) -> None:
    """A copy with int8 projections, a scale for each row: what vLLM runs on any CPU."""
    shutil.copytree(source, folder)
    out: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("proj.weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            out[name] = (tensor / scale).round().to(torch.int8)
            out[f"{name}_scale"] = scale
        else:
            out[name] = tensor
    save_file(out, folder / "model.safetensors", {"format": "pt"})
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**int8, "strategy": "channel", "dynamic": False},
        "input_activations": {**int8, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


def _restore_names(file: Path) -> None:
    """The names of the vision tower that published checkpoints have and vLLM reads."""
    tensors = load_file(file)
    old, new = "vision_tower.", "vision_tower.vision_model."
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(renamed, file, {"format": "pt"})
