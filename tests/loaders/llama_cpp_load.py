"""llama.cpp: a GGUF of its converter in its runtime, as the package cyllama ships that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import probe
from cyllama.llama import llama_cpp
from llama_cpp_convert import converted, norm


def load(checkpoint: Path, folder: Path) -> object:
    """This build aborts when it computes with the tiny original, so loading is all it shows."""
    file = converted(checkpoint, folder)
    # The reason is logged to the file descriptor, so the runtime needs a process of its own.
    command = [sys.executable, __file__, "--only", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reasons = (line for line in done.stderr.splitlines() if "wrong shape" in line)
        raise RuntimeError(next(reasons, done.stderr[-200:]).rpartition("model: ")[2])
    return norm(file).ravel().tolist()


if __name__ == "__main__":
    if sys.argv[1] == "--only":
        llama_cpp.LlamaModel(sys.argv[2], llama_cpp.LlamaModelParams())
    else:
        probe.report("cyllama", load)
