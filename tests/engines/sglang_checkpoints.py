"""Tiny checkpoints as on the Hub: SGLang reads keys and names that transformers dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

from gemma_fold.commands.convert import convert

_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_QWEN = {"full_attention_interval": 2}
#: model type -> what its config.json has on the Hub; for the inner config where there is one.
_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": _GEMMA,
    # SGLang caps the logits with a Triton kernel, also where there is no GPU for it.
    "gemma2": {**_GEMMA, "final_logit_softcapping": None},
    "qwen3_next": _QWEN,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
}


def save(model_type: str, folder: Path, seed: int = 0) -> Path:
    """Write a bf16 checkpoint of the family."""
    tiny.build(model_type, torch.bfloat16, seed).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    inner = config.get("text_config", config)
    inner.update(_CONFIGS.get(model_type, {}))
    vision = config.get("vision_config", {})
    vision.update({"deepstack_visual_indexes": []} if "depth" in vision else {})
    vision.update({"vision_use_head": False} if model_type == "gemma3" else {})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if model_type == "gemma3":
        _name_towers(folder / "model.safetensors")
    if model_type.startswith("qwen3"):
        _add_draft(folder / "model.safetensors")
    return folder


def _add_draft(file: Path) -> None:
    """The layer that predicts a second token, as Qwen publishes it beside the model."""
    tensors = load_file(file)
    norm = next(name for name in tensors if name.endswith("layers.1.input_layernorm.weight"))
    layer, hidden = norm.removesuffix("input_layernorm.weight"), tensors[norm].shape[0]
    generator = torch.Generator().manual_seed(7)
    draft = {"mtp.fc.weight": torch.randn(hidden, 2 * hidden, generator=generator) * 0.02}
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        draft[f"mtp.{name}.weight"] = torch.randn(hidden, generator=generator)
    for name, tensor in tensors.items():
        if name.startswith(layer):
            shift = 0.25 if tensor.dim() == 1 else 0.0
            draft[f"mtp.layers.0.{name.removeprefix(layer)}"] = tensor + shift
    tensors.update({name: tensor.bfloat16() for name, tensor in draft.items()})
    save_file(tensors, file, {"format": "pt"})


def _name_towers(file: Path) -> None:
    """Gemma 3 with its vision tower under the name it has on the Hub, and without a head."""
    tensors = {}
    for name, tensor in load_file(file).items():
        if not name.startswith("vision_tower.head."):
            tensors[name.replace("vision_tower.", "vision_tower.vision_model.", 1)] = tensor
    save_file(tensors, file, {"format": "pt"})


class Checkpoints:
    """Original and folded checkpoints of every family, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def original(self, family: str, seed: int = 0) -> Path:
        folder = self.folder / f"{family}-{seed}"
        return folder if folder.is_dir() else save(family, folder, seed)

    def folded(self, family: str, seed: int = 0) -> Path:
        folder = self.folder / f"{family}-{seed}-folded"
        if not folder.is_dir():
            convert(self.original(family, seed), folder)
        return folder
