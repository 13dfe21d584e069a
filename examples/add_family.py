"""Teach gemma-fold a family that it does not know, and fold a checkpoint of it.

    python examples/add_family.py

A family is one row: which norms there are, by their whole names, and the evidence that the model
multiplies by 1 + w. Here the row joins the table of this process alone. For good it stands in a
file of gemma_fold/rules/families; CONTRIBUTING.md says what else belongs to it. Before there is a
row, every command refuses the model: nothing is guessed from names, and nothing from values.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import gemma_fold
from gemma_fold.rules import Evidence, lookup
from gemma_fold.rules.row import Family, Norm, Plain
from gemma_fold.rules.table import BY_MODEL_TYPE

ROW = Family(
    model_types=("opal",),
    norms=(
        Norm("layers.{i}.{pre,post}_norm.weight"),  # two of each layer
        Norm("norm.weight"),
    ),
    plain=(Plain("embed_norm.weight", "a norm of another class, which multiplies by w itself"),),
    evidence=Evidence("read", "Opal 1.0 modeling_opal.py:41: x * (1 + self.weight)"),
)


def write_checkpoint(folder: Path) -> None:
    """Two layers of a made-up model, with nothing but what this is about."""
    rng = np.random.default_rng(0)
    layers = (f"layers.{i}.{place}_norm.weight" for i in range(2) for place in ("pre", "post"))
    norms = [f"model.{name}" for name in (*layers, "norm.weight", "embed_norm.weight")]
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "opal", "architectures": ["Opal"], "num_hidden_layers": 2})
    )
    save_file(
        {name: rng.normal(0, 0.3, 64).astype(np.float16) for name in norms},
        folder / "model.safetensors",
    )


def main(folder: Path) -> None:
    original, folded = folder / "opal", folder / "opal-folded"
    write_checkpoint(original)
    try:
        gemma_fold.convert(original, folded)
    except gemma_fold.UnsupportedModelError as error:
        print(f"without a row: {error}")

    BY_MODEL_TYPE["opal"] = (ROW,)
    for name in ("model.layers.1.pre_norm.weight", "model.embed_norm.weight"):
        print(f"{name}: {lookup('opal', name).kind}")
    report = gemma_fold.convert(original, folded)
    print(f"with one: {report.tensors} norms folded, {report.elements} weights")
    print(f"verified against the original: {gemma_fold.verify(folded, against=original).ok}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
