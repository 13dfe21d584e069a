"""PEFT: `AutoPeftModelForCausalLM.from_pretrained` of an adapter for the checkpoint."""

from __future__ import annotations

from pathlib import Path

import peft
import probe
from plain_model import empty
from transformers_auto import logits


def load(checkpoint: Path, folder: Path) -> object:
    settings = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings.base_model_name_or_path = str(checkpoint)
    peft.PeftModel(empty(checkpoint), settings).save_pretrained(folder / "adapter")
    return logits(peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter"))


if __name__ == "__main__":
    probe.report("peft", load)
