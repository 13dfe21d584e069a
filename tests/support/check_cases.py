"""Right and wrong files of every format and family, and what `check` should say of each.

    cd tests/support && python check_cases.py

makes all of them, checks them, and keeps what was said in tests/data/check_cases.json, from which
`make docs` makes the tables of docs/check.md. Nothing else is kept.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import families
import ml_dtypes
import norm_files as files
import numpy as np
import tiny
import torch
from norm_files import QUANTIZERS, added, only, rounded

from gemma_fold import check, convert
from gemma_fold.commands.check import CheckReport
from gemma_fold.compare.offsets.finding import Finding

RESULTS = Path(__file__).parents[1] / "data" / "check_cases.json"
#: Families whose norms are all plain, to which a converter may add 1 all the same.
PLAIN = ("llama", "gemma3n_text", "gemma4_text")
#: Those whose norms have names, shapes or neighbours of their own; one quantizer is enough here.
TRAPS = (
    "minimax_m3_vl_text",
    "minimax_m3_vl",
    "muse_glimmer_text",
    "qwen4_exp_text",
    "step3p7",
    "gemma3",
)
ZERO_CENTRED = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "qwen3_next",
    "qwen3_5_text",
    "nemotron",
    "vaultgemma",
    *TRAPS,
)
FAMILIES = (*ZERO_CENTRED, *PLAIN)
IN_GGUF = {*files.GGUF_ARCHITECTURES, *files.NEWER_ARCHITECTURES}
IN_MLX = [f for f in ZERO_CENTRED if f != "vaultgemma"]
BF16 = ml_dtypes.bfloat16
#: A zero-centred norm of the first layer, and one outside of the layers or at their end.
_ENDS = {
    "minimax_m3_vl": ("layers.0.input_layernorm", "language_model.model.norm."),
    "muse_glimmer_text": ("layers.0.input_layernorm", "layers.1.post_feedforward_layernorm"),
    "qwen4_exp_text": ("layers.0.attn_hyper_connection", "model.hyper_connection_mixer"),
}


def ends(family: str) -> tuple[str, str]:
    """Parts of the names of two norms."""
    return _ENDS.get(family, ("layers.0.input_layernorm", "model.norm"))


@dataclass(frozen=True)
class Case:
    """A file to make, or `NAME=FILE.npy` of single norms: `found` is what its wrong norms are."""

    form: str
    defect: str
    write: Callable[[Path, Path], Path | list[str]]
    found: Finding | None = None


def case(form: str, defect: str, found: Finding | None, write: object, **more: object) -> Case:
    writer: Callable[..., Any] = write  # type: ignore[assignment]
    return Case(form, defect, lambda original, out: writer(original, out, **more), found)


def swapped_gguf(original: Path, out: Path) -> Path:
    return files.write_gguf(original, out, files.swapped(files.norms_of(original)))


def misfolded(form: str, write: object) -> Iterator[Case]:
    yield case(form, "not folded", Finding.NOT_FOLDED, write, change=added(-1))
    yield case(form, "doubled", Finding.DOUBLED, write, change=added(1))


def gguf_cases(family: str) -> Iterator[Case]:
    gguf = files.write_gguf
    first, last = ends(family)
    yield case("gguf", "right", None, gguf)
    if family in PLAIN:
        yield case("gguf", "added to plain", Finding.UNASKED, gguf, change=added(0, extra=1))
        return
    yield from misfolded("gguf", gguf)
    yield case("gguf", "bf16", Finding.ROUNDED, gguf, dtype=BF16)
    yield case("gguf", "fp16", Finding.ROUNDED, gguf, dtype=np.float16)
    yield case("gguf", "from rounded gamma", Finding.ROUNDED, gguf, change=rounded(BF16))
    half = only(last, lambda v: v - np.float32(0.5))
    yield case("gguf", "half an offset", Finding.OFFSET, gguf, change=half)
    rolled = only(first, lambda v: np.roll(v, 1))
    yield case("gguf", "permuted", Finding.PERMUTED, gguf, change=rolled)
    yield case("gguf", "one norm missing", Finding.ABSENT, gguf, drop=first.replace("0", "1"))
    yield case("gguf", "layers swapped", Finding.OTHER_NORM, swapped_gguf)
    missing = only(last, lambda v: v - np.float32(1))
    yield case("gguf", "one norm not folded", Finding.NOT_FOLDED, gguf, change=missing)
    if family.startswith("qwen") or family == "muse_glimmer_text":
        yield case("gguf", "added to plain", Finding.UNASKED, gguf, change=added(0, extra=1))


def mlx_cases(family: str) -> Iterator[Case]:
    mlx = files.write_mlx
    adds = family in files.MLX_ADDS
    yield case("mlx", "right", None, mlx)
    yield case("mlx", "prefixed", None, mlx, prefix="language_model.")
    yield case(
        "mlx", "added again", Finding.DOUBLED if adds else Finding.UNASKED, mlx, change=added(1)
    )
    if adds:
        yield case("mlx", "not added", Finding.NOT_FOLDED, mlx, change=added(-1))


def folder_cases(family: str) -> Iterator[Case]:
    folder = files.write_folder
    first, last = ends(family)
    yield case("merged", "right", None, folder)
    yield case("merged", "peft names", None, folder, prefix="base_model.model.")
    yield case("megatron", "float32", None, folder, dtype=np.float32)
    for tool, settings in QUANTIZERS.items():
        if family in TRAPS and tool != "modelopt":
            continue
        config = {"quantization_config": settings}
        yield case(tool, "right", None, folder, config=config)
        if family in PLAIN:
            continue
        yield case(tool, "folded", Finding.UNASKED, folder, config=config, change=added(1))
        through = rounded(BF16)
        yield case(tool, "rounded", Finding.ROUNDED, folder, config=config, change=through)
    if family in PLAIN:
        yield case("merged", "added", Finding.UNASKED, folder, change=added(0, extra=1))
        return
    yield case("merged", "doubled", Finding.DOUBLED, folder, change=added(2))
    yield case("megatron", "subtracted", Finding.NOT_FOLDED, folder, change=added(-1))
    zeros = only(first, np.zeros_like)
    yield case("merged", "identity", Finding.ABSORBED, folder, change=zeros)
    noise = only(last, lambda v: np.random.default_rng(9).normal(0, 1, v.size))
    yield case("merged", "another model", Finding.CHANGED, folder, change=noise, dtype=np.float32)
    longer = only(last, lambda v: np.append(v, v))
    yield case("merged", "longer", Finding.SHAPE, folder, change=longer)
    yield case("merged", "fp8 norms", Finding.UNREADABLE, folder, dtype=ml_dtypes.float8_e4m3fn)
    half = only(last, lambda v: v * np.float32(0.75))
    yield case("merged", "w times 0.75", Finding.SCALED_W, folder, change=half, dtype=np.float32)


def folded_cases(family: str) -> Iterator[Case]:
    def fold(original: Path, out: Path, **more: object) -> Path:
        convert(original, out, **more)  # type: ignore[arg-type]
        return out

    if family not in PLAIN:
        yield case("folded", "right", None, fold)
        yield case("folded", "no tensor lock", None, fold, tensor_lock=False)


def tensor_cases(family: str) -> Iterator[Case]:
    arrays = files.write_arrays
    yield case("tensors", "right", None, arrays)
    if family in PLAIN:
        yield case("tensors", "added", Finding.UNASKED, arrays, change=added(0, extra=1))
        return
    yield from misfolded("tensors", arrays)


def cases(family: str) -> Iterator[Case]:
    if family in IN_GGUF:
        yield from gguf_cases(family)
    if family in IN_MLX:
        yield from mlx_cases(family)
    yield from folder_cases(family)
    yield from folded_cases(family)
    yield from tensor_cases(family)


TABLE = [(family, one) for family in FAMILIES for one in cases(family)]


def originals(root: Path) -> dict[str, Path]:
    """A small original of each family, of weights that are the same every time."""
    found = {family: root / family for family in FAMILIES}
    for family in ZERO_CENTRED:
        if family in TRAPS:
            families.build(family, torch.bfloat16).save_pretrained(found[family])
        else:
            tiny.save(family, found[family], torch.bfloat16)
    for family in PLAIN:
        make = files.plain_llama if family == "llama" else partial(files.from_facts, family)
        make(found[family])
    return found


def checked(wanted: Case, original: Path, folder: Path) -> CheckReport:
    """Make the file of a case below `folder`, and check it."""
    made = wanted.write(original, folder / ("a.gguf" if wanted.form == "gguf" else "made"))
    if isinstance(made, list):
        return check(tensors=made, against=original)
    return check(made, against=original)


def as_row(family: str, one: Case, found: set[Finding], exit_code: int) -> dict[str, Any]:
    """What is kept of a case."""
    wrong = sorted(finding.value for finding in found)
    return {
        "family": family,
        "format": one.form,
        "file": one.defect,
        "finding": wrong,
        "exit": exit_code,
    }


def expected(family: str, one: Case) -> dict[str, Any]:
    """What should be kept of it."""
    return as_row(family, one, {one.found} if one.found else set(), int(one.found is not None))


def main() -> None:
    """Run every case, and keep what was found."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        made = originals(Path(name))
        for number, (family, one) in enumerate(TABLE):
            folder = Path(name) / str(number)
            folder.mkdir()
            report = checked(one, made[family], folder)
            wrong = {norm.finding for norm in report.norms if not norm.right}
            rows.append(as_row(family, one, wrong, report.verdict.exit_code))
            shutil.rmtree(folder)
    RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(f"{len(rows)} files, {sum(row['exit'] == 0 for row in rows)} of them right")


if __name__ == "__main__":
    main()
