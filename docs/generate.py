"""Fill the generated blocks of the documents: `make docs`, and a test that nothing went stale.

A block stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a key of BLOCKS.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import measured
import measured_fused
import measured_loaders
import measured_parallel
import measured_reliability
import rules_files

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "docs/measurements.md",
    "docs/all_reduce.md",
    "docs/vllm.md",
    "docs/sglang.md",
    "docs/reliability.md",
    "docs/compatibility.md",
    "docs/rules.md",
)
MODEL = ".cache/gemma-3-270m"


def inspect_transcript() -> str:
    """What `gemma-fold inspect` prints for the real Gemma 3 270M."""
    command = [sys.executable, "-m", "gemma_fold", "inspect", Path(MODEL).name]
    result = subprocess.run(
        command, cwd=(ROOT / MODEL).parent, capture_output=True, text=True, check=True
    )
    return f"```\n$ gemma-fold inspect {Path(MODEL).name}\n{result.stdout}```"


def diff_transcript() -> str:
    """What `gemma-fold diff` prints for it and its folded self, weights and outputs."""
    name = Path(MODEL).name
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).symlink_to(ROOT / MODEL)
        for arguments in (
            ["convert", name, "-o", f"{name}-folded"],
            ["diff", name, f"{name}-folded", "--no-outputs"],
        ):
            command = [sys.executable, "-m", "gemma_fold", *arguments]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return f"```\n$ gemma-fold {' '.join(arguments)}\n{result.stdout}```"


BLOCKS: dict[str, Callable[[], str]] = {
    "inspect": inspect_transcript,
    "diff": diff_transcript,
    "decode": measured.decode,
    "gpu_diff": measured.gpu_diff,
    "vllm_diff": measured.vllm_diff,
    "gpu_floor": measured.gpu_floor,
    "convert": measured.convert,
    "all_reduce": measured_parallel.all_reduce,
    "all_reduce_stress": measured_parallel.stress,
    "all_reduce_protocols": measured_parallel.protocols,
    "all_reduce_two_shot": measured_parallel.two_shot,
    "all_reduce_sanitizer": measured_parallel.sanitizer,
    "crash_matrix": measured_reliability.crash_matrix,
    "fuzz": measured_reliability.fuzz,
    "loaders": measured_loaders.loaders,
    "fused": measured_fused.fused,
    "headline": measured_parallel.headline,
    "vllm": measured_parallel.vllm,
    "sglang": measured_parallel.sglang,
    "rule_families": rules_files.families,
    "rule_classes": rules_files.classes,
    "rule_plain": rules_files.plain,
}


def filled(text: str) -> str:
    """`text` with every generated block made anew."""
    return re.sub(
        r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(filled(path.read_text()))
    for path, text in rules_files.packaged().items():
        path.write_text(text)
