"""What `gemma-fold check` says of what real tools write: `make docs` shows it in docs/check.md.

    cd tests && python -m loaders.checked GEMMA_3_270M mlx=PYTHON llama_cpp=PYTHON ...

GEMMA_3_270M is the folder that examples/make_gemma3_270m.py builds, PYTHON an interpreter that has
the tool. Results replace those of the same rows in tests/data/checked.json; nothing else is kept.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from gemma_fold import check

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "data" / "checked.json"

#: row -> (interpreter's name on the command line, maker, original, what is done in words).
ROWS = {
    "llama_cpp": ("llama_cpp", "llama_cpp", "bf16", "llama.cpp's converter"),
    "llama_cpp_fp16": ("llama_cpp", "llama_cpp", "fp16", "llama.cpp's converter, of float16"),
    "mlx_lm": ("mlx", "mlx_lm", "bf16", "`mlx_lm.convert`"),
    "mlx_lm_q4": ("mlx", "mlx_lm_q4", "bf16", "`mlx_lm.convert -q`"),
    "mlx_qwen3_5": ("mlx", "mlx_qwen3_5", "qwen3_5", "mlx-lm, a tiny Qwen3.5"),
    "mlx_qwen3_5_again": (
        "mlx",
        "mlx_qwen3_5_again",
        "qwen3_5",
        "the same twice, with the convolution put back in between",
    ),
    "llmcompressor": ("llmcompressor", "llmcompressor", "bf16", "`oneshot`, FP8"),
    "peft": ("peft", "peft", "bf16", "`merge_and_unload`"),
}


def originals(real: Path, folder: Path) -> dict[str, Path]:
    """The real 270M, the same in float16, and a tiny Qwen3.5."""
    import tiny
    import torch
    from safetensors.torch import load_file, save_file

    half = shutil.copytree(real, folder / "fp16")
    weights = {n: t.half() for n, t in load_file(half / "model.safetensors").items()}
    (half / "model.safetensors").unlink()
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((half / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    (half / "config.json").write_text(json.dumps(config | {key: "float16"}))

    qwen = tiny.save("qwen3_5", folder / "qwen3_5", torch.bfloat16)
    config = json.loads((qwen / "config.json").read_text())
    config["text_config"] |= {"full_attention_interval": 2}  # which mlx-lm goes by
    (qwen / "config.json").write_text(json.dumps(config))
    return {"bf16": real, "fp16": half, "qwen3_5": qwen}


def row(python: str, name: str, sources: dict[str, Path], folder: Path) -> dict[str, Any]:
    """What a tool makes of its original, and what `check` says of that."""
    _, maker, source, words = ROWS[name]
    out = folder / (f"{name}.gguf" if maker == "llama_cpp" else name)
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"HOME": str(folder), "HF_HOME": os.fspath(folder / "hf")}
    done = subprocess.run(
        [python, str(HERE / "makers.py"), maker, str(sources[source]), str(out)],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    report = check(out, against=sources[source])
    return {
        **json.loads(done.stdout.splitlines()[-1]),
        "call": words,
        "format": report.file.format,
        "findings": dict(Counter(norm.finding.value for norm in report.norms)),
        "changed": sum(norm.changed for norm in report.norms),
        "elements": sum(norm.elements for norm in report.norms),
        "right": report.verdict.right,
        "line": report.verdict.line,
        "date": datetime.date.today().isoformat(),
    }


def main(arguments: list[str]) -> None:
    """Run every row whose interpreter is given."""
    pythons = dict(argument.split("=", 1) for argument in arguments[1:])
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        sources = originals(Path(arguments[0]).absolute(), Path(folder))
        for name, (key, *_) in ROWS.items():
            if key in pythons:
                found[name] = row(pythons[key], name, sources, Path(folder))
                print(name, found[name]["line"], flush=True)
                ordered = {n: found[n] for n in ROWS if n in found}
                RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
