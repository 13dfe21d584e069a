"""`save_pretrained` of a folded transformers model on the same bench.

transformers writes into the folder itself, so OUT is not absent or complete in between. The promise
is that what lies there until then is refused by every loader.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import tiny
import torch

import gemma_fold
from crash.scenes import OUT, Scene, Yard
from crash.shim import SKIP_SYNC, control
from crash.trees import Tree, tree
from crash.trials import Bench, Trial

MANIFEST = "gemma_fold.json"
_SAVE = ("save", "new")
SCENES = {
    scene.name: scene
    for scene in (
        Scene("save_pretrained", _SAVE, _SAVE, wanted=""),
        Scene("save_pretrained over an earlier save", _SAVE, _SAVE, wanted="", old=True),
    )
}


class SaveBench(Bench):
    """Accepts what no loader would take for a checkpoint, too."""

    def _state(self) -> str:
        state = super()._state()
        for name, wanted in self.references.items():
            if state.startswith("broken") and self._same(wanted, self.yard.stash / name):
                return name
        return state

    def _same(self, wanted: Tree, reference: Path) -> bool:
        """But for the temporary files that a killed safetensors library leaves, and their names."""
        folder = self.yard.folder / OUT
        found = {name: value for name, value in tree(folder).items() if not _is_temporary(name)}
        if MANIFEST not in found or {**found, MANIFEST: wanted[MANIFEST]} != wanted:
            return False
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = {n: file for n, file in manifest["files"].items() if not _is_temporary(n)}
        return {**manifest, "files": files} == json.loads((reference / MANIFEST).read_bytes())

    def _acceptable(self, scene: Scene, trial: Trial) -> bool:
        return super()._acceptable(scene, trial) or is_refused(self.yard.folder / OUT)

    def _complaint(self, trial: Trial) -> list[str]:
        return []  # the errors are those of transformers


def _is_temporary(name: str) -> bool:
    return name.startswith(".tmp")


def is_refused(folder: Path) -> bool:
    """Whether loaders refuse the folder.

    It has no config; or a folded one without a manifest; or the original one over tensors that do
    not fit it, or cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return True
    if config.get("model_type") == "gemma_fold":
        return not (folder / MANIFEST).exists()
    return not any(map(_is_plain, _weights(folder)))


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _is_plain(path: Path) -> bool:
    """Whether a weight file is whole and one of its norms is not locked, by the file's format."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + length])
    except ValueError:
        return False
    header.pop("__metadata__", None)
    if len(raw) != 8 + length + max(entry["data_offsets"][1] for entry in header.values()):
        return False
    norms = [entry for name, entry in header.items() if name.endswith("norm.weight")]
    return any(entry["dtype"] != "F32" or len(entry["shape"]) != 2 for entry in norms)


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
