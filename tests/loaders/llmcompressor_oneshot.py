"""llm-compressor: `oneshot` with FP8 weights and dynamic activations, which needs no data."""

from __future__ import annotations

from pathlib import Path

import makers
import probe


def load(checkpoint: Path, folder: Path) -> object:
    makers.llmcompressor(checkpoint, folder / "out")
    return sorted(path.name for path in (folder / "out").iterdir())


if __name__ == "__main__":
    probe.report("llmcompressor", load)
