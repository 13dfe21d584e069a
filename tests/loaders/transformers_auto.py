"""transformers: `AutoModelForCausalLM.from_pretrained`."""

from __future__ import annotations

from pathlib import Path

import probe
import torch
import transformers


def load(checkpoint: Path, folder: Path) -> object:
    return logits(transformers.AutoModelForCausalLM.from_pretrained(checkpoint))


def logits(model: torch.nn.Module) -> list[float]:
    """After a fixed prompt."""
    with torch.no_grad():
        return model(torch.arange(2, 9)[None]).logits[0, -1].tolist()


if __name__ == "__main__":
    probe.report("transformers", load)
