"""llm-compressor: `model_free_ptq`, which builds no model and quantizes file by file."""

from __future__ import annotations

from pathlib import Path

import probe
from llmcompressor import model_free_ptq
from written import described


def load(checkpoint: Path, folder: Path) -> object:
    ignore = ["lm_head", "re:.*embed_tokens$", "re:.*norm$"]
    model_free_ptq(str(checkpoint), str(folder / "out"), "FP8_DYNAMIC", ignore=ignore, device="cpu")
    return described(folder / "out")


if __name__ == "__main__":
    probe.report("llmcompressor", load)
