"""Bad input: one line that says what, why and what to do; the output folder left untouched."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, HIDDEN, gemma3_tensors, tree, write_checkpoint
from commands import run_here
from safetensors.numpy import save_file

Damage = Callable[[Path], None]


def assert_refused(source: Path, out: Path, exit_code: int, message: str, *options: str) -> None:
    """convert fails with one line that matches, and neither OUT nor SOURCE was touched."""
    before = sorted(out.parent.rglob("*"))
    result = run_here("convert", source, "-o", out, *options)
    assert result.returncode == exit_code, result.stderr
    assert result.stdout == ""
    line = result.stderr.strip()
    assert "\n" not in line and line.startswith("gemma-fold: ")
    assert re.search(message, line), line
    assert sorted(out.parent.rglob("*")) == before


# --- not a checkpoint that can be folded ---------------------------------------------------------


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def edit_config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def write(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data) and None


def edit_index(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def add_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def two_indexes(folder: Path) -> None:
    (folder / "model.safetensors.index.json").rename(folder / "a.safetensors.index.json")
    (folder / "b.safetensors.index.json").write_text("{}")


def only(name: str) -> Damage:
    def damage(folder: Path) -> None:
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        (folder / name).write_bytes(b"\x80\x04not unpickled")

    return damage


SHARD_1 = "model-00001-of-00002.safetensors"
SHARD_2 = "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"

FOLDERS: dict[str, tuple[Damage, int, str]] = {
    "no config": (remove("config.json"), 2, "no config.json.*model folder"),
    "config not JSON": (write("config.json", b"{"), 2, "config.json is not valid JSON"),
    "config not UTF-8": (write("config.json", b'{"a": "\xff"}'), 2, "config.json is not valid"),
    "config a list": (write("config.json", b"[]"), 2, "config.json does not hold a JSON object"),
    "unknown model type": (edit_config(model_type="gemma99"), 3, "gemma99"),
    "no model type": (edit_config(model_type=None), 3, "model_type"),
    "plain family": (edit_config(model_type="llama"), 3, "llama.*plain"),
    "already folded": (edit_config(model_type="gemma_fold"), 2, "folded already"),
    "missing shard": (remove(SHARD_2), 2, f"{SHARD_2} is missing.*finish the download"),
    "missing index": (remove("model.safetensors.index.json"), 2, "2 weight files but no"),
    "index not JSON": (write("model.safetensors.index.json", b"x"), 2, "not valid JSON"),
    "index without map": (write("model.safetensors.index.json", b"{}"), 2, "no weight_map"),
    "shard above the folder": (
        edit_index(lambda m: m.update({NORM: "../other.safetensors"})),
        2,
        "points outside the folder",
    ),
    "shard at an absolute path": (
        edit_index(lambda m: m.update({NORM: "/etc/passwd"})),
        2,
        "points outside the folder",
    ),
    "tensor absent from its shard": (
        edit_index(lambda m: m.update({"model.ghost.weight": SHARD_1})),
        2,
        "model.ghost.weight is in .*but it is in no file",
    ),
    "tensor in another shard": (
        edit_index(lambda m: m.update({NORM: SHARD_2 if m[NORM] == SHARD_1 else SHARD_1})),
        2,
        f"{NORM} is in .*but it is in model-",
    ),
    "tensor not in the index": (
        edit_index(lambda m: m.pop(NORM)),
        2,
        f"{NORM} of .* is not in model.safetensors.index.json",
    ),
    "tensor in two shards": (
        lambda folder: save_file(
            {NORM: np.zeros(HIDDEN, np.float32)}, folder / "extra.safetensors"
        ),
        2,
        f"{NORM} is in both",
    ),
    "file and index": (
        lambda folder: save_file({"x": np.zeros(1)}, folder / "model.safetensors"),
        2,
        "both model.safetensors and an index",
    ),
    "two indexes": (two_indexes, 2, "several weight indexes"),
    "adapter": (add_adapter, 2, "PEFT adapter.*merge"),
    "only .bin": (only("pytorch_model.bin"), 2, "pickled weights .*never opened.*convert"),
    "only .pt": (only("model.pt"), 2, "pickled weights"),
    "only GGUF": (only("model.gguf"), 2, "no \\*.safetensors"),
    "dangling link": (
        lambda folder: (folder / "vocab.txt").symlink_to("nowhere"),
        2,
        "cannot read .*vocab.txt",
    ),
    "named pipe": (lambda folder: os.mkfifo(folder / "pipe"), 2, "neither a file nor a folder"),
    "link to a folder above": (
        lambda folder: (folder / "loop").symlink_to("."),
        2,
        "links back to a folder above",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folder_is_refused(case: str, tmp_path: Path) -> None:
    damage, exit_code, message = FOLDERS[case]
    source = write_checkpoint(tmp_path / "model", shards=2)
    damage(source)
    assert_refused(source, tmp_path / "out", exit_code, message)


# --- tensors -------------------------------------------------------------------------------------


def with_tensor(name: str, value: Any) -> dict[str, Any]:
    return gemma3_tensors() | {name: value}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in gemma3_tensors().items() if key != name}


TENSORS: dict[str, tuple[dict[str, Any], int, str]] = {
    "unclassified norm": (
        with_tensor("model.layers.0.new_norm.weight", np.zeros(4, np.float16)),
        3,
        "model.layers.0.new_norm.weight",
    ),
    "missing final norm": (without(NORM), 2, f"{NORM}"),
    "missing layer norm": (
        without("model.layers.2.pre_feedforward_layernorm.weight"),
        2,
        "layers.2.pre_feedforward_layernorm",
    ),
    "fp8 norm": (
        with_tensor(NORM, np.zeros(HIDDEN, ml_dtypes.float8_e4m3fn)),
        2,
        f"{NORM} .*F8_E4M3.*quantized from",
    ),
    "integer norm": (with_tensor(NORM, np.zeros(HIDDEN, np.int8)), 2, f"{NORM} .*I8"),
    "float64 norm": (with_tensor(NORM, np.zeros(HIDDEN)), 2, f"{NORM} .*F64"),
    "matrix as norm": (
        with_tensor(NORM, np.zeros((2, HIDDEN), np.float16)),
        2,
        f"{NORM} .*shape \\[2, {HIDDEN}\\]",
    ),
    "gamma without its config": (
        with_tensor(NORM, np.zeros((HIDDEN, 1), np.float32)),
        2,
        "\\[H, 1\\] of a folded gamma",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensor_is_refused(case: str, tmp_path: Path) -> None:
    tensors, exit_code, message = TENSORS[case]
    source = write_checkpoint(tmp_path / "model", tensors)
    assert_refused(source, tmp_path / "out", exit_code, message)


def test_nan_and_infinity_are_reported_and_folded(tmp_path: Path) -> None:
    w = np.ones(HIDDEN, np.float16)
    w[:3] = [np.nan, np.inf, -np.inf]
    source = write_checkpoint(tmp_path / "model", with_tensor(NORM, w))
    result = run_here("convert", source, "-o", tmp_path / "out")
    assert result.returncode == 0
    assert "NaN or infinity in 1 norms" in result.stderr
    assert run_here("verify", tmp_path / "out", "--against", source).returncode == 0
    assert run_here("unfold", tmp_path / "out", "-o", tmp_path / "back").returncode == 0
    assert tree(tmp_path / "back") == tree(source)


# --- damaged headers, through the command line ---------------------------------------------------


def rewrite(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def edit_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    def rewritten(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return rewrite(rewritten)


def with_length(raw: bytes, length: int) -> bytes:
    return length.to_bytes(8, "little") + raw[8:]


HEADERS: dict[str, tuple[Damage, str]] = {
    "truncated data": (rewrite(lambda raw: raw[:-1]), "truncated"),
    "truncated header": (
        rewrite(lambda raw: raw[:100]),
        "header would have .* bytes, but the file has",
    ),
    "empty file": (rewrite(lambda raw: b""), "0 bytes long"),
    "header too large": (rewrite(lambda raw: with_length(raw, 1 << 40)), "over the format's"),
    "not UTF-8": (rewrite(lambda raw: raw[:20] + b"\xff" + raw[21:]), "not UTF-8"),
    "trailing bytes": (rewrite(lambda raw: raw + b"x"), "1 bytes of data after the last"),
    "overlap": (
        edit_header(lambda h: h[NORM].update(data_offsets=[0, 2 * HIDDEN])),
        "overlaps|unused",
    ),
    "hole": (edit_header(lambda h: h.pop(NORM)), "unused|after the last"),
    "out of range": (
        edit_header(lambda h: h[NORM].update(data_offsets=[1 << 40, (1 << 40) + 2 * HIDDEN])),
        "unused|missing",
    ),
    "duplicate key": (
        rewrite(lambda raw: raw.replace(b"model.layers.0.", b"model.layers.1.")),
        "appears twice",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_weight_file_is_refused(case: str, tmp_path: Path) -> None:
    damage, message = HEADERS[case]
    source = write_checkpoint(tmp_path / "model")
    damage(source)
    assert_refused(source, tmp_path / "out", 2, f"model.safetensors.*({message})")


# --- sources that are not folders, outputs that are in the way ------------------------------------


def test_source_that_is_no_folder(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert_refused(gguf, tmp_path / "out", 2, "GGUF file.*original safetensors")
    weights = write_checkpoint(tmp_path / "model") / "model.safetensors"
    assert_refused(weights, tmp_path / "out", 2, "is a file; give the folder")
    assert_refused(tmp_path / "absent", tmp_path / "out", 2, "does not exist")


def test_output_that_endangers_the_source(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a/model")
    link = tmp_path / "link"
    link.symlink_to(source)
    for option in ((), ("--force",)):
        assert_refused(source, source, 2, "is the source itself", *option)
        assert_refused(source, link, 2, "is the source itself", *option)
        assert_refused(source, source / "out", 2, "inside the source", *option)
        assert_refused(source, tmp_path / "a", 2, "contains the source", *option)


def test_output_that_is_in_the_way(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    assert_refused(source, tmp_path / "full", 2, "not empty")
    assert_refused(source, tmp_path / "file", 2, "is a file")
    (tmp_path / "empty").mkdir()
    assert run_here("convert", source, "-o", tmp_path / "empty").returncode == 0


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    assert run_here("convert", tmp_path).returncode == 2
    assert run_here("no-such-command").returncode == 2
    assert run_here("verify", tmp_path).returncode == 2


def test_plain_families_have_nothing_to_fold(tmp_path: Path) -> None:
    tensors = {"model.norm.weight": np.ones(HIDDEN, np.float16)}
    for model_type in ("gemma3n_text", "gemma4_text", "qwen3", "llama"):
        config = CONFIG | {"model_type": model_type}
        source = write_checkpoint(tmp_path / model_type, tensors, config)
        assert_refused(source, tmp_path / "out", 3, f"{model_type}.*plain gamma")
        result = run_here("inspect", source)
        assert result.returncode == 3 and "nothing to fold" in result.stdout
