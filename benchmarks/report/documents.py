"""The generated blocks of the documents: `make docs` fills them, a test that they are not stale.

A block stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is a key of BLOCKS.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import (
    all_reduce,
    cache_write,
    checks,
    commands,
    engines,
    evidence,
    faster,
    linear,
    measurements,
    norms,
    rules,
)
from benchmarks.run import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
MODEL = ROOT / ".cache" / "gemma-3-270m"
Block = Callable[[], str]


def inspect_transcript() -> str:
    """What `gemma-fold inspect` prints for the real Gemma 3 270M."""
    return _transcript(MODEL.parent, "inspect", MODEL.name)


def diff_transcript() -> str:
    """What `gemma-fold diff` prints for it and its folded self."""
    with tempfile.TemporaryDirectory() as name:
        folder, folded = Path(name), f"{MODEL.name}-folded"
        (folder / MODEL.name).symlink_to(MODEL)
        _transcript(folder, "convert", MODEL.name, "-o", folded)
        return _transcript(folder, "diff", MODEL.name, folded, "--no-outputs")


def _transcript(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "gemma_fold", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return f"```\n$ gemma-fold {' '.join(arguments)}\n{done.stdout}```"


#: Made with the real model, which takes a while.
TRANSCRIPTS: dict[str, Block] = {"inspect": inspect_transcript, "diff": diff_transcript}
TABLES: dict[str, Block] = {
    "all_reduce": all_reduce.all_reduce,
    "all_reduce_protocols": all_reduce.protocols,
    "all_reduce_sanitizer": checks.all_reduce_sanitizer,
    "all_reduce_stress": all_reduce.stress,
    "all_reduce_two_shot": all_reduce.two_shot,
    "batch_invariance": engines.batch_invariance,
    "cache_write": cache_write.cache_write,
    "commands": commands.reference,
    "convert": measurements.convert,
    "crash_matrix": evidence.crash_matrix,
    "decode": measurements.decode,
    "faster": faster.faster,
    "fused": evidence.fused,
    "fuzz": evidence.fuzz,
    "gpu_diff": measurements.gpu_diff,
    "gpu_floor": measurements.gpu_floor,
    "gpu_tests": checks.gpu_tests,
    "headline": engines.headline,
    "linear": linear.linear,
    "linear_weights": linear.weights,
    "loaders": evidence.loaders,
    "checked": evidence.checked,
    "check_files": evidence.check_files,
    "check_kinds": evidence.check_kinds,
    "norms": norms.norms,
    "norms_points": norms.points,
    "norms_sanitizer": checks.norms_sanitizer,
    "rl_sync": evidence.rl_sync,
    "rule_classes": rules.classes,
    "rule_families": rules.families,
    "rule_plain": rules.plain,
    "sglang": engines.sglang,
    "vllm": engines.vllm,
    "vllm_diff": measurements.vllm_diff,
}
BLOCKS = {**TRANSCRIPTS, **TABLES}
_BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)\n?(<!-- end -->)", re.DOTALL)


def found(document: Path) -> dict[str, str]:
    """The blocks of a document as they stand there, by name."""
    return {match[2]: match[3] for match in _BLOCK.finditer(document.read_text())}


def fill(document: Path) -> None:
    """Make every block of it anew."""
    text = document.read_text()
    made = _BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[4]}", text)
    if made != text:
        document.write_text(made)
