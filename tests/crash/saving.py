"""`save_pretrained` of a folded transformers model on the same bench.

Over an earlier save the files are replaced one after the other, as others may lie beside them. The
promise is that every loader refuses what is there in between.
"""

from __future__ import annotations

import os
from pathlib import Path

import tiny
import torch

import gemma_fold
from crash.scenes import OUT, Scene, Yard
from crash.shim import SKIP_SYNC, control
from crash.trees import tree
from crash.trials import Bench, Trial

_SAVE = ("save", "new")
SCENES = {
    scene.name: scene
    for scene in (
        Scene("save_pretrained", _SAVE, _SAVE, wanted=""),
        Scene("save_pretrained over an earlier save", _SAVE, _SAVE, wanted="", old=True),
    )
}


class SaveBench(Bench):
    """Accepts an earlier save that no loader takes for a checkpoint any more, too."""

    def _acceptable(self, scene: Scene, trial: Trial) -> bool:
        return super()._acceptable(scene, trial) or (
            scene.old and is_refused(self.yard.folder / OUT)
        )

    def _complaint(self, trial: Trial) -> list[str]:
        return []  # the errors are those of transformers


def is_refused(folder: Path) -> bool:
    """Whether the folder is there, but without the file that every loader begins with."""
    return folder.is_dir() and not (folder / "config.json").exists()


def set_up(folder: Path) -> Bench:
    """A yard, two folded models in memory, and the folders they are saved as."""
    torch.set_num_threads(1)
    models = {
        name: gemma_fold.fold_model(tiny.build("gemma3_text", torch.bfloat16, seed)).eval()
        for seed, name in enumerate(("new", "old"))
    }

    def save(arguments: tuple[str, ...]) -> int:
        models[arguments[1]].save_pretrained(OUT)
        return 0

    yard = Yard(folder / "yard", folder / "stash")
    os.chdir(yard.folder)
    bench = SaveBench(yard, control(), save, flags=SKIP_SYNC)
    yard.pristine()
    for name in models:  # in this process: what transformers imports, no trial has to
        save(("save", name))
        bench.references[name] = tree(yard.folder / OUT)
        (yard.folder / OUT).rename(yard.stash / name)
    return bench
