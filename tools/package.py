"""Build wheel and sdist, and try each as a user has it: in a new environment, without torch.

    python tools/package.py [--extra NAME ...] [--out FOLDER]

There a small checkpoint is inspected, folded, verified and unfolded. Each extra named is installed
from the wheel into one more environment, where it is imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import ROOT, Python, created, last_words

#: A module that each extra is for.
EXTRAS = {
    "torch": "gemma_fold.ops",
    "transformers": "gemma_fold.engines.transformers.plugin",
    "serve": "transformers.cli.serve",
    "report": "gemma_fold.compare.report.charts",
    "all": "gemma_fold.engines.transformers.plugin",
}
_CONFIG = {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "num_hidden_layers": 1,
    "torch_dtype": "bfloat16",
}
_NORMS = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
_WORDS = "core needs no torch: inspect, convert, verify and unfold ran"


def build(python: Python, out: Path) -> list[Path]:
    """The sdist, and the wheel that is built from it."""
    python.install("build")
    before = set(out.glob("*"))
    python.run("-m", "build", "--outdir", str(out), str(ROOT))
    return sorted(set(out.glob("*")) - before)


def write_model(folder: Path) -> None:
    """A Gemma of one layer, whose norms hold every bf16 there is below 1.0."""
    width = 0x3F80
    norm = struct.pack(f"<{width}H", *range(width))
    entries = {
        f"model.{name}.weight": {
            "dtype": "BF16",
            "shape": [width],
            "data_offsets": [i * len(norm), (i + 1) * len(norm)],
        }
        for i, name in enumerate(_NORMS)
    }
    header = json.dumps(entries).encode()
    folder.mkdir()
    weights = struct.pack("<Q", len(header)) + header + norm * len(_NORMS)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps(_CONFIG))


def sums(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def try_core(package: Path, folder: Path) -> None:
    """Install `package` alone, and take a checkpoint there and back.

    Raises:
        subprocess.CalledProcessError: a step failed.
        AssertionError: torch was installed, or the bytes that came back are not the original's.
    """
    python = created(folder / "core")
    python.install(str(package))
    held = {line.split("==")[0].lower() for line in python.run("-m", "pip", "freeze").splitlines()}
    assert not held & {"torch", "transformers", "safetensors"}, sorted(held)
    write_model(folder / "model")
    command = str(folder / "core" / "bin" / "gemma-fold")
    for step in (
        "--version",
        "inspect model",
        "convert model -o folded",
        "verify folded",
        "verify folded --against model",
        "diff model folded --no-outputs",
        "unfold folded -o again",
    ):
        subprocess.run(
            [command, *step.split()], cwd=folder, capture_output=True, text=True, check=True
        )
    assert sums(folder / "again") == sums(folder / "model")


def try_extra(wheel: Path, extra: str, folder: Path) -> None:
    """Install an extra, and import what it is for."""
    python = created(folder / extra)
    python.install(f"{wheel}[{extra}]")
    python.run("-m", "pip", "check")
    python.run("-I", "-c", f"import {EXTRAS[extra]}")  # not from this folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extra", action="append", default=[], choices=EXTRAS)
    parser.add_argument("--out", type=Path, help="keep what was built here")
    options = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)  # or pip takes what is there for installed
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        out = options.out or work / "dist"
        try:
            built = build(created(work / "build"), out)
            for package in built:
                folder = work / package.suffix
                folder.mkdir()
                try_core(package, folder)
                print(f"{package.name}: {_WORDS} on Python {sys.version.split()[0]}", flush=True)
            wheel = next(package for package in built if package.suffix == ".whl")
            for extra in options.extra:
                try_extra(wheel, extra, work)
                print(f"{wheel.name}[{extra}]: installed and imported", flush=True)
        except subprocess.CalledProcessError as error:
            print(f"{error.cmd}: {last_words(error)}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
