"""accelerate: `load_checkpoint_and_dispatch` into a model of the original's sizes."""

from __future__ import annotations

from pathlib import Path

import accelerate
import probe
from plain_model import empty
from transformers_auto import logits


def load(checkpoint: Path, folder: Path) -> object:
    model = empty(checkpoint)
    file = str(checkpoint / "model.safetensors")
    return logits(accelerate.load_checkpoint_and_dispatch(model, file, device_map={"": "cpu"}))


if __name__ == "__main__":
    probe.report("accelerate", load)
