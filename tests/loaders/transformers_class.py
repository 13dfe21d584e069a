"""transformers: `Gemma3ForCausalLM.from_pretrained`."""

from __future__ import annotations

from pathlib import Path

import probe
import transformers
from transformers_auto import logits


def load(checkpoint: Path, folder: Path) -> object:
    return logits(transformers.Gemma3ForCausalLM.from_pretrained(checkpoint))


if __name__ == "__main__":
    probe.report("transformers", load)
