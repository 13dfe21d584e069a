"""`check` reads headers and norms, whatever the size of the file; from the Hub, too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import ml_dtypes
import norm_files as files
import numpy as np
import pytest
import tiny
import torch
from commands import run_here
from hubserver import HubServer

from gemma_fold import CheckpointError, HostError, check
from gemma_fold.checkpoint.header import with_length
from gemma_fold.checkpoint.hub import download
from gemma_fold.compare.files.opening import open_file

_LAYERS, _HIDDEN, _HEAD, _WIDE = 62, 5376, 128, 21504
_NORMS = {
    "input_layernorm": ("attn_norm", _HIDDEN),
    "post_attention_layernorm": ("post_attention_norm", _HIDDEN),
    "pre_feedforward_layernorm": ("ffn_norm", _HIDDEN),
    "post_feedforward_layernorm": ("post_ffw_norm", _HIDDEN),
    "self_attn.q_norm": ("attn_q_norm", _HEAD),
    "self_attn.k_norm": ("attn_k_norm", _HEAD),
}
_ELEMENTS = _LAYERS * (4 * _HIDDEN + 2 * _HEAD) + _HIDDEN
_MATRICES = {"q": (4096, _HIDDEN), "o": (_HIDDEN, 4096), "up": (3 * _WIDE, _HIDDEN)}


def sparse_folder(folder: Path) -> Path:
    """A Gemma 3 of 27 billion parameters: norms and headers are there, matrices are holes."""
    shapes = {"model.embed_tokens.weight": (262_208, _HIDDEN), "model.norm.weight": (_HIDDEN,)}
    for layer in range(_LAYERS):
        shapes |= {f"model.layers.{layer}.{n}.weight": (s,) for n, (_, s) in _NORMS.items()}
        shapes |= {f"model.layers.{layer}.{n}_proj.weight": s for n, s in _MATRICES.items()}
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        start = end
    raw = with_length(json.dumps(header).encode())
    folder.mkdir()
    config = {"model_type": "gemma3_text", "num_hidden_layers": _LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(raw)
        file.truncate(len(raw) + start)
        for name, shape in shapes.items():
            if len(shape) == 1:
                file.seek(len(raw) + header[name]["data_offsets"][0])
                file.write(_weights(name, shape[0]).tobytes())
    return folder


def sparse_gguf(path: Path) -> int:
    """The same as llama.cpp has it, with a vocabulary of Gemma's size; the length of its header."""
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(_LAYERS)
    writer.add_token_list([f"token {n}" for n in range(262_144)])
    writer.add_array("tokenizer.ggml.merges", [f"to ken{n}" for n in range(514_906)])
    names = {"output_norm": ("model.norm.weight", _HIDDEN)}
    for layer in range(_LAYERS):
        for ours, (theirs, size) in _NORMS.items():
            names[f"blk.{layer}.{theirs}"] = (f"model.layers.{layer}.{ours}.weight", size)
    for stored, (name, size) in names.items():
        w = _weights(name, size).astype(np.float32)
        writer.add_tensor(f"{stored}.weight", w + np.float32(1))
    files.finish(writer)
    header = path.stat().st_size - 4 * _ELEMENTS
    with open(path, "r+b") as file:
        file.truncate(16 << 30)
    return header


def _weights(name: str, size: int) -> np.ndarray:
    rng = np.random.default_rng(sum(map(ord, name)))
    return rng.normal(0, 1, size).astype(ml_dtypes.bfloat16)


def _header_length(folder: Path) -> int:
    with open(folder / "model.safetensors", "rb") as file:
        return int.from_bytes(file.read(8), "little")


def _bytes_read() -> int:
    """By this process so far, as the kernel counts."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar:")))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A folder, a GGUF file, and the bytes of both headers."""
    root = tmp_path_factory.mktemp("sparse")
    folder, made = sparse_folder(root / "original"), root / "a.gguf"
    return folder, made, 8 + _header_length(folder) + sparse_gguf(made)


@pytest.mark.parametrize("command", ["check", "diff"])
def test_the_kernel_counts_no_more_than_headers_and_norms(
    command: str, sparse: tuple[Path, Path, int]
) -> None:
    folder, made, headers = sparse
    sides = (made, "--against", folder) if command == "check" else (folder, made)
    run_here(command, *sides)  # so that all modules are imported
    before = _bytes_read()
    assert run_here(command, *sides, "--json").returncode == 0
    read = _bytes_read() - before
    # Headers are read in blocks of a megabyte, so the last reaches into the tensors.
    assert read < headers + 6 * _ELEMENTS + (2 << 20) < made.stat().st_size / 500


def test_of_27_billion_parameters_only_norms_are_read(sparse: tuple[Path, Path, int]) -> None:
    folder, made, _ = sparse
    report = check(made, against=folder)
    assert report.verdict.right is True and len(report.norms) == 6 * _LAYERS + 1
    assert report.against is not None
    header = _header_length(folder)
    config = (folder / "config.json").stat().st_size
    assert report.against.read == 2 * _ELEMENTS + 8 + header + config
    assert report.against.size > 50e9
    # The header of a GGUF file is mostly its vocabulary, and is read in blocks.
    assert report.file.read < 4 * _ELEMENTS + (32 << 20) < report.file.size / 100


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return tiny.save("gemma3_text", tmp_path / "original", torch.bfloat16)


class TestHub:
    def test_only_headers_and_norms_are_fetched(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = files.write_gguf(original, tmp_path / "a.gguf")
        norms = sum(2 * norm.w.size for norm in files.norms_of(original).values())
        length = _header_length(original)
        with HubServer() as hub:
            commit = hub.add("org/original", original)
            hub.use(monkeypatch, tmp_path / "cache")
            report = check(made, against="org/original")
            sent = hub.sent["org/original/model.safetensors"]
        assert report.verdict.right is True
        assert report.against is not None and report.against.commit == commit
        # One read of the header fetches more than it, at most what the file has.
        assert sent <= max(1 << 17, 8 + length) + norms

    def test_offline_asks_the_cache(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        with pytest.raises(HostError):
            check(original, against="org/original")

    def test_offline_a_downloaded_original_is_found(
        self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = files.write_gguf(original, tmp_path / "a.gguf")
        with HubServer() as hub:
            commit = hub.add("org/original", original)
            hub.use(monkeypatch, tmp_path / "cache")
            download("org/original")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        report = check(made, against="org/original")
        assert report.verdict.right is True
        assert report.against is not None and report.against.commit == commit


def test_a_file_that_shrinks(original: Path, tmp_path: Path) -> None:
    """Between the header and the norms, as of a download that is still going on."""
    made = files.write_gguf(original, tmp_path / "a.gguf")
    file = open_file(str(made))
    shutil.copy(made, tmp_path / "b.gguf")
    with open(made, "r+b") as stream:
        stream.truncate(made.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match="shrank"):
        file.values(list(file.tensors))
