"""torch: `load_state_dict(strict=False)` into a transformers model of the original's sizes."""

from __future__ import annotations

from pathlib import Path

import probe
from plain_model import empty
from safetensors.torch import load_file
from transformers_auto import logits


def load(checkpoint: Path, folder: Path) -> object:
    model = empty(checkpoint)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    model.tie_weights()
    return logits(model)


if __name__ == "__main__":
    probe.report("torch", load)
