"""How much is fused in each family by the engines of this environment, into tests/data/fused.json.

    PYTHONPATH=. python tests/support/fused_counts.py [--print]

Run it once in an environment of each version; rows of other versions stay. With --print the rows of
this one go to stdout, as JSON, and no file is written. transformers runs: each
family is built small, and its outputs before and after folding are compared bit for bit. vLLM's and
SGLang's sources are read, and their forwards run on stand-ins: no kernel of theirs runs.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny
import torch

from gemma_fold.engines import checks, doctor
from gemma_fold.engines.transformers import layers
from gemma_fold.engines.transformers.norms import FoldedNorm
from gemma_fold.engines.transformers.weights import zero_centred_norms

RESULTS = Path(__file__).resolve().parents[1] / "data" / "fused.json"
#: Sandwiches of the models in `tiny`, counted by hand in their sources.
IN_TRANSFORMERS = {
    "gemma": 0,
    "vaultgemma": 0,
    "gemma2": 4,
    "gemma3_text": 4,
    "gemma3": 4,
    "shieldgemma2": 4,
    "t5gemma": 10,
    "t5gemma2": 8,
    "muse_glimmer": 4,
}
#: Those of two layers, by hand too; Gemma 1 and Qwen have one norm a block, and no sandwich.
IN_SERVERS = {"gemma2": 4, "gemma3": 4}


def rows() -> Iterator[dict[str, Any]]:
    version = doctor.installed("transformers")
    if version is not None and checks.numbers(version) >= (5, 17):
        for family, expected in IN_TRANSFORMERS.items():
            if family in tiny.available():
                yield {
                    "engine": "transformers",
                    "version": version,
                    "family": family,
                    "expected": expected,
                    **_run(family),
                }
    for engine in ("vllm", "sglang"):
        version = doctor.installed(engine)
        for family, expected in IN_SERVERS.items() if version is not None else ():
            config = {"model_type": family, "num_hidden_layers": 2}
            found = doctor.outlook(engine, config)
            yield {
                "engine": engine,
                "version": version,
                "family": family,
                "expected": expected,
                "fused": found.report.fused if found.report is not None else 0,
                "level": "read",
                "why": str(found.report or found.note) if not found.complete or found.note else "",
            }


def _run(family: str) -> dict[str, Any]:
    model = tiny.build(family, torch.bfloat16)
    before = _outputs(model, family)
    for module, fold in zero_centred_norms(model):
        FoldedNorm.adopt(module, fold)
    fusion = layers.fuse_layers(model)
    same = all(map(torch.equal, before, _outputs(model, family)))
    return {
        "fused": fusion.fused,
        "level": "run on CPU" if same else "other bits",
        "why": "; ".join(map(str, fusion.missing)),
    }


def _outputs(model: Any, family: str) -> list[torch.Tensor]:
    with torch.no_grad():
        result = model(**tiny.inputs(family, torch.bfloat16))
    values = [v for v in result.values() if isinstance(v, torch.Tensor)]
    return [v for v in values if v.is_floating_point()]


def main() -> None:
    warnings.simplefilter("ignore")
    if sys.argv[1:] == ["--print"]:
        print(json.dumps(list(rows())))
        return
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    new = list(rows())
    here = {(row["engine"], row["version"]) for row in new}
    kept = [row for row in kept if (row["engine"], row["version"]) not in here]
    order = list(checks.TESTED)
    both = sorted(
        [*kept, *new],
        key=lambda row: (order.index(row["engine"]), checks.numbers(row["version"])),
    )
    RESULTS.write_text(json.dumps(both, indent=1) + "\n")
    for row in new:
        print(*row.values())


if __name__ == "__main__":
    main()
