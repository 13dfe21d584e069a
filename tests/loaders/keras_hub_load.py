"""keras-hub: `Gemma3Backbone.from_preset` on a transformers checkpoint."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "torch"

from pathlib import Path

import keras_hub
import numpy as np
import probe


def load(checkpoint: Path, folder: Path) -> object:
    model = keras_hub.models.Gemma3Backbone.from_preset(str(checkpoint), dtype="float32")
    tokens = np.arange(2, 9)[None]
    found = model({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    return found[0, -1].detach().tolist()


if __name__ == "__main__":
    probe.report("keras-hub", load)
