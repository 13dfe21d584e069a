"""convert, verify, unfold and inspect on small checkpoints, judged by the safetensors library."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    CONFIG,
    HIDDEN,
    gemma3_tensors,
    is_norm,
    read_tensors,
    tree,
    write_checkpoint,
)
from safetensors.numpy import save_file

from gemma_fold.commands.convert import convert
from gemma_fold.commands.inspect import inspect
from gemma_fold.commands.unfold import unfold
from gemma_fold.commands.verify import verify
from gemma_fold.errors import AlreadyFoldedError, UsageError
from gemma_fold.rules import Kind, Verdict


@pytest.fixture(params=[1, 4], ids=["single file", "4 shards"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", shards=request.param)


def test_norms_become_gamma_and_nothing_else_changes(source: Path, tmp_path: Path) -> None:
    before = tree(source)
    convert(source, tmp_path / "out")
    assert tree(source) == before
    original, folded = read_tensors(source), read_tensors(tmp_path / "out")
    assert original.keys() == folded.keys()
    for name, w in original.items():
        gamma = folded[name]
        if is_norm(name):
            assert gamma.dtype == np.float32 and gamma.shape == (*w.shape, 1)
            exact = 1.0 + w.astype(np.float64)
            np.testing.assert_array_equal(gamma[:, 0], exact.astype(np.float32))
        else:
            assert gamma.dtype == w.dtype and gamma.tobytes() == w.tobytes()


def test_other_files_are_copied(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    before, after = tree(source), tree(tmp_path / "out")
    generated = {"config.json", "model.safetensors.index.json", "gemma_fold.json"}
    for name in before.keys() - generated:
        assert name.endswith(".safetensors") or after[name] == before[name]
    assert after.keys() - before.keys() == {"gemma_fold.json"}


def test_config_is_locked_and_carries_the_original(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "gemma_fold"
    assert config["architectures"] == ["GemmaFoldGemma3ForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["base_config"] == CONFIG
    assert config["gemma_fold"]["format"] == 1


def test_index_says_where_tensors_are_and_how_large(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=4)
    convert(source, tmp_path / "out")
    name = "model.safetensors.index.json"
    before = json.loads((source / name).read_text())
    after = json.loads((tmp_path / "out" / name).read_text())
    assert after["weight_map"] == before["weight_map"]
    real = sum(tensor.nbytes for tensor in read_tensors(tmp_path / "out").values())
    assert after["metadata"]["total_size"] == real


def test_dtype_is_inferred_where_the_config_names_none(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "torch_dtype"}
    source = write_checkpoint(tmp_path / "model", config=config)
    convert(source, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("tensor_lock", [True, False])
def test_unfold_restores_every_byte(dtype: Any, tensor_lock: bool, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", gemma3_tensors(dtype), shards=2)
    convert(source, tmp_path / "out", tensor_lock=tensor_lock)
    unfold(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(source)
    assert tree(tmp_path / "out") != tree(source)


def test_without_tensor_lock_gammas_keep_their_shape(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    convert(source, tmp_path / "out", tensor_lock=False)
    assert read_tensors(tmp_path / "out")["model.norm.weight"].shape == (HIDDEN,)
    assert verify(tmp_path / "out", against=source).ok


def test_odd_headers_come_back_byte_for_byte(tmp_path: Path) -> None:
    """Header order other than offset order, padding, and metadata no one else writes."""
    source = write_checkpoint(tmp_path / "model")
    path = source / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    shuffled = dict(reversed(header.items()))
    shuffled["__metadata__"] = {"format": "pt", "nöte": "ß"}
    text = json.dumps(shuffled, indent=1).encode() + b" " * 4099
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    convert(source, tmp_path / "out")
    unfold(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(source)
    assert list(read_tensors(tmp_path / "out")) == list(read_tensors(source))


def test_odd_sizes_stay_readable_by_torch(tmp_path: Path) -> None:
    """float32 behind an odd number of bytes cannot be viewed: the layout has to move it."""
    torch_io = pytest.importorskip("safetensors.torch")
    tensors = gemma3_tensors()
    tensors["model.aaa"] = np.arange(3, dtype=np.uint8)
    source = write_checkpoint(tmp_path / "model", tensors)
    _put_first(source / "model.safetensors", "model.aaa")
    convert(source, tmp_path / "out")
    loaded = torch_io.load_file(tmp_path / "out/model.safetensors")
    expected = 1 + read_tensors(source)["model.norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(loaded["model.norm.weight"][:, 0].numpy(), expected)
    unfold(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(source)


@pytest.mark.parametrize("padding", [0, 8, 24])
def test_weights_keep_their_alignment(padding: int, tmp_path: Path) -> None:
    """What is memory-mapped at the same offset modulo 64 is summed in the same order."""
    tensors = {name: np.resize(t, (64, *t.shape[1:])) for name, t in gemma3_tensors().items()}
    source = write_checkpoint(tmp_path / "model", tensors)
    path = source / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b" " * padding
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    convert(source, tmp_path / "out")
    before, after = offsets(path), offsets(tmp_path / "out/model.safetensors")
    assert any(before[name] != after[name] for name in before)
    assert all(before[name] % 64 == after[name] % 64 for name in before)


def offsets(path: Path) -> dict[str, int]:
    """Where each tensor of a weight file begins."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


def _put_first(path: Path, first: str) -> None:
    """Rewrite a file with `first` at the start of the data section, as no library would."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__")
    ordered = sorted(header, key=lambda name: (name != first, header[name]["data_offsets"]))
    body = b""
    for name in ordered:
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [len(body), len(body) + end - begin]
        body += data[begin:end]
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=2)
    for path in source.rglob("*.safetensors"):
        path.chmod(0o600)
    previous = os.umask(0o027)
    try:
        convert(source, tmp_path / "out")
    finally:
        os.umask(previous)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert modes == {0o640}


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", dry_run=True)
    assert report.tensors == 19
    assert sorted(tmp_path.iterdir()) == [source]


def test_dry_run_announces_the_real_size(source: Path, tmp_path: Path) -> None:
    announced = convert(source, tmp_path / "out", dry_run=True).size
    convert(source, tmp_path / "out")
    written = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert announced == written


def test_extra_weight_files_are_folded_too(tmp_path: Path) -> None:
    """Engines load every *.safetensors of a folder, whether or not an index names it."""
    tensors = gemma3_tensors()
    moved = tensors.pop("model.norm.weight")
    source = write_checkpoint(tmp_path / "model", tensors)
    save_file({"model.norm.weight": moved}, source / "norm.safetensors")
    convert(source, tmp_path / "out")
    gamma = read_tensors(tmp_path / "out")["model.norm.weight"]
    np.testing.assert_array_equal(gamma[:, 0], 1 + moved.astype(np.float32))


def test_folding_twice_is_refused(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(AlreadyFoldedError, match="folded already"):
        convert(tmp_path / "out", tmp_path / "twice")
    # Nor when someone has put the original config back.
    (tmp_path / "out/config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(AlreadyFoldedError):
        convert(tmp_path / "out", tmp_path / "twice")
    (tmp_path / "out/gemma_fold.json").unlink()
    with pytest.raises(AlreadyFoldedError):
        convert(tmp_path / "out", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    assert tree(tmp_path / "out").keys() == before.keys() - {"gemma_fold.json"}


def test_force_replaces_a_folded_checkpoint_and_nothing_else(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    first = tree(out)
    with pytest.raises(UsageError, match="not empty"):
        convert(source, out)
    convert(source, out, force=True)
    assert tree(out) == first
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a folded checkpoint"):
        convert(source, precious, force=True)
    assert tree(precious).keys() == {"thesis.txt"}


def test_verify_passes_and_compares_every_byte(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    report = verify(tmp_path / "out", against=source)
    assert report.ok and report.tensors == 19
    payload = sum(tensor.nbytes for tensor in read_tensors(source).values())
    assert report.bytes_compared >= payload


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_norm.weight"])
def test_verify_finds_one_flipped_bit_in_a_gamma(name: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    convert(source, tmp_path / "out")
    _flip_bit(tmp_path / "out/model.safetensors", name)
    report = verify(tmp_path / "out")
    assert len(report.problems) == 1 and name in report.problems[0]


def test_verify_against_the_source_finds_one_flipped_bit_elsewhere(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    convert(source, tmp_path / "out")
    _flip_bit(tmp_path / "out/model.safetensors", "model.layers.0.mlp.up_proj.weight")
    for against in (None, source):
        report = verify(tmp_path / "out", against=against)
        assert len(report.problems) == 1 and "model.safetensors" in report.problems[0]


def _flip_bit(path: Path, name: str) -> None:
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    begin, _ = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    raw[8 + length + begin] ^= 1
    path.write_bytes(raw)


def test_verify_finds_a_changed_tokenizer_and_a_missing_file(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    convert(source, tmp_path / "out")
    data = bytearray((tmp_path / "out/tokenizer.json").read_bytes())
    data[5] ^= 1
    (tmp_path / "out/tokenizer.json").write_bytes(data)
    assert "tokenizer.json" in verify(tmp_path / "out").problems[0]
    assert "tokenizer.json" in verify(tmp_path / "out", against=source).problems[0]
    (tmp_path / "out/tokenizer.json").unlink()
    assert "tokenizer.json is missing" in verify(tmp_path / "out").problems[0]


def test_verify_finds_a_replaced_config(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    convert(source, tmp_path / "out")
    (tmp_path / "out/config.json").write_text(json.dumps(CONFIG))
    assert "gemma_fold config" in verify(tmp_path / "out").problems[0]


def test_verify_against_another_source_fails(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    other = write_checkpoint(tmp_path / "other", gemma3_tensors(seed=1))
    convert(source, tmp_path / "out")
    report = verify(tmp_path / "out", against=other)
    assert any("model.norm.weight" in problem for problem in report.problems)


def test_inspect_counts_what_bf16_would_lose(source: Path) -> None:
    found = inspect(source)
    assert found.classification.verdict is Verdict.FOLDABLE
    lost = 0
    for name, w in read_tensors(source).items():
        if is_norm(name):
            gamma = (1 + w.astype(np.float64)).astype(np.float32)
            lost += int((gamma.astype(ml_dtypes.bfloat16).astype(np.float32) != gamma).sum())
    assert found.bf16_changes == lost > 0
    groups = {group.pattern: group for group in found.norms}
    assert groups["model.layers.{i}.self_attn.q_norm.weight"].count == 3
    assert {group.kind for group in found.norms} == {Kind.ZERO_CENTRED}


def with_a_sparse_terabyte(source: Path) -> Path:
    """A checkpoint with a terabyte of zeros that takes no space on the disk."""
    path = source / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    end = len(data) + (1 << 40)
    entry = {"dtype": "U8", "shape": [1 << 40], "data_offsets": [len(data), end]}
    text = json.dumps({**header, "model.layers.0.mlp.down_proj.weight": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    os.truncate(path, 8 + len(text) + end)
    return source


def test_inspect_reads_headers_only(tmp_path: Path) -> None:
    """Reading any large part of it would take hours."""
    source = with_a_sparse_terabyte(write_checkpoint(tmp_path / "model"))
    assert inspect(source).size > 1 << 40


def test_holes_stay_holes_and_need_no_space(tmp_path: Path) -> None:
    source = with_a_sparse_terabyte(write_checkpoint(tmp_path / "model"))
    if (source / "model.safetensors").stat().st_blocks > 1 << 20:
        pytest.skip("this file system keeps no holes")
    convert(source, tmp_path / "out", digest=False)
    unfold(tmp_path / "out", tmp_path / "back")
    for folder in ("out", "back"):
        status = (tmp_path / folder / "model.safetensors").stat()
        assert status.st_size > 1 << 40
        assert status.st_blocks * 512 < 1 << 20
    assert beginning(tmp_path / "back") == beginning(source)


def beginning(folder: Path) -> bytes:
    """The header and all but the zeros of a checkpoint `with_a_sparse_terabyte`."""
    with open(folder / "model.safetensors", "rb") as file:
        return file.read(1 << 16)


def test_inspect_recognises_a_folded_checkpoint(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    assert inspect(tmp_path / "out").classification.verdict is Verdict.ALREADY_FOLDED


def test_a_checkpoint_in_the_hub_cache_is_never_written_through(tmp_path: Path) -> None:
    """Snapshots are links to blobs that other models share."""
    plain = write_checkpoint(tmp_path / "plain", shards=2)
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    (snapshot / "2_Dense").mkdir(parents=True)
    blobs.mkdir()
    for name, digest in tree(plain).items():
        (blobs / digest).write_bytes((plain / name).read_bytes())
        (snapshot / name).symlink_to(os.path.relpath(blobs / digest, (snapshot / name).parent))
    before = tree(blobs)
    convert(snapshot, tmp_path / "out")
    assert tree(blobs) == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    manifest = json.loads((tmp_path / "out/gemma_fold.json").read_text())
    assert manifest["source"] == {"name": "org/name", "repo_id": "org/name", "commit": "a" * 40}
    shard = "model-00001-of-00002.safetensors"
    assert manifest["files"][shard]["sha256"] == tree(plain)[shard]
    unfold(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(plain)
