"""llama.cpp: its convert_hf_to_gguf, as the package of that name ships it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import probe
import sentencepiece
import written
from safetensors.torch import load_file


def load(checkpoint: Path, folder: Path) -> object:
    """It builds no model; whether it adds 1 to what the file holds shows in what it writes."""
    found = norm(converted(checkpoint, folder))
    stored = load_file(checkpoint / "model.safetensors")[written.NORM].float().numpy()
    if not np.array_equal(found, stored + 1):
        return f"writes norms {list(found.shape)}"
    return f"writes norms {list(found.shape)}, 1 added to what the file holds"


def norm(file: Path) -> np.ndarray:
    """The weight of the first norm in a GGUF file."""
    tensors = gguf.GGUFReader(file).tensors
    return next(tensor.data for tensor in tensors if tensor.name == "blk.0.attn_norm.weight")


def converted(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as a GGUF file."""
    source = shutil.copytree(checkpoint, folder / "source")
    config = json.loads((source / "config.json").read_text())
    _add_tokenizer(source, config.get("base_config", config)["vocab_size"])
    program = Path(sys.executable).with_name("convert-hf-to-gguf")
    result = subprocess.run(
        [program, source, "--outfile", folder / "model.gguf"], capture_output=True, text=True
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1])
    return folder / "model.gguf"


def _add_tokenizer(folder: Path, size: int) -> None:
    """The converter writes the vocabulary too, so there must be one."""
    text = (" ".join(f"{a}{b}" for a in "abcdefgh" for b in "ijklmnop") for _ in range(9))
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=text,
        model_prefix=str(folder / "tokenizer"),
        vocab_size=size,
        hard_vocab_limit=False,
        minloglevel=2,
    )


if __name__ == "__main__":
    probe.report("convert-hf-to-gguf", load)
