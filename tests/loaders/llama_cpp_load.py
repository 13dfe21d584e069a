"""llama.cpp: a GGUF of its converter in its runtime, as the package cyllama ships that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import probe
from cyllama.llama import llama_cpp
from llama_cpp_convert import converted


def load(checkpoint: Path, folder: Path) -> object:
    file = converted(checkpoint, folder)
    # llama.cpp logs its reason to the file descriptor, so it needs a process of its own.
    command = [sys.executable, __file__, "--logits", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(next(line for line in done.stderr.splitlines() if "wrong shape" in line))
    return [float(value) for value in done.stdout.splitlines()[-1].split()]


def logits(file: str) -> list[float]:
    """After a fixed prompt."""
    model = llama_cpp.LlamaModel(file, llama_cpp.LlamaModelParams())
    context = llama_cpp.LlamaContext(model, llama_cpp.LlamaContextParams())
    context.decode(llama_cpp.llama_batch_get_one(list(range(2, 9))))
    return list(context.get_logits_ith(-1))


if __name__ == "__main__":
    if sys.argv[1] == "--logits":
        print(*logits(sys.argv[2]))
    else:
        probe.report("cyllama", load)
