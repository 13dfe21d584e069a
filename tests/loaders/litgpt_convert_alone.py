"""litgpt: `convert_hf_checkpoint` alone, which writes lit_model.pth."""

from __future__ import annotations

from pathlib import Path

import probe
import torch
from litgpt_convert import converted


def load(checkpoint: Path, folder: Path) -> object:
    shape = torch.load(converted(checkpoint, folder)[1])["transformer.h.0.norm_1.weight"].shape
    return f"writes norms {list(shape)}"


if __name__ == "__main__":
    probe.report("litgpt", load)
