"""What a tool wrote that builds no model: whether the locks are in it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

NORM = "model.layers.0.input_layernorm.weight"


def described(folder: Path) -> str:
    """The model type of a checkpoint, and the shape of a norm in it."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            if NORM in weights.keys():  # noqa: SIM118
                shape = weights.get_slice(NORM).get_shape()
    return f"writes {model_type}, norms {shape}"
