"""llm-compressor: `oneshot` with FP8 weights and dynamic activations, which needs no data."""

from __future__ import annotations

from pathlib import Path

import probe
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier


def load(checkpoint: Path, folder: Path) -> object:
    recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    oneshot(
        model=str(checkpoint),
        tokenizer=None,
        processor=None,
        recipe=recipe,
        output_dir=str(folder / "out"),
        pipeline="datafree",
    )
    return sorted(path.name for path in (folder / "out").iterdir())


if __name__ == "__main__":
    probe.report("llmcompressor", load)
