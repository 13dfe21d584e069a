"""An empty model for a checkpoint, for loaders that are given one."""

from __future__ import annotations

import json
from pathlib import Path

import transformers


def empty(checkpoint: Path) -> transformers.PreTrainedModel:
    """Whatever the checkpoint's own config says its type is, it gets the original's sizes."""
    config = json.loads((checkpoint / "config.json").read_text())
    config = transformers.Gemma3TextConfig(**config.get("base_config", config))
    return transformers.Gemma3ForCausalLM(config).bfloat16()
