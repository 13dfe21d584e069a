"""mlx-lm: its `load_model`, strict as by default, on the CPU."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import probe
from mlx_lm.utils import load_model


def load(checkpoint: Path, folder: Path) -> object:
    mx.set_default_device(mx.cpu)
    model, _ = load_model(checkpoint, model_config={"sliding_window_pattern": 2})
    return model(mx.array([list(range(2, 9))]))[0, -1].astype(mx.float32).tolist()


if __name__ == "__main__":
    probe.report("mlx-lm", load)
