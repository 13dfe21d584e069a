"""mergekit: `run_merge` of a checkpoint with a copy of it, which averages every tensor."""

from __future__ import annotations

import shutil
from pathlib import Path

import probe
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from written import described


def load(checkpoint: Path, folder: Path) -> object:
    copy = shutil.copytree(checkpoint, folder / "copy")
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (checkpoint, copy)]
    plan = {"models": models, "merge_method": "linear", "dtype": "bfloat16"}
    options = MergeOptions(copy_tokenizer=False, device="cpu")
    run_merge(MergeConfiguration.model_validate(plan), str(folder / "merged"), options)
    return described(folder / "merged")


if __name__ == "__main__":
    probe.report("mergekit", load)
