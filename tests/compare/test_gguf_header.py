"""GGUF headers: what the `gguf` package writes is read; what is damaged is refused in one line."""

from __future__ import annotations

import os
import random
import resource
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from commands import run_here
from gguf.tensor_mapping import get_tensor_name_map
from norm_files import finish

from gemma_fold.compare.files.gguf import read_gguf, read_tensor
from gemma_fold.compare.files.gguf_names import ARCHITECTURES, config_of, transformers_name
from gemma_fold.compare.files.opening import open_file
from gemma_fold.errors import CheckpointError, GemmaFoldError, UnsupportedModelError
from gemma_fold.rules import Kind, classify


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Every kind of key, and tensors of one and more dimensions."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma3")
    writer.add_block_count(2)
    writer.add_custom_alignment(64)
    writer.add_bool("a.bool", True)
    writer.add_float64("a.double", 0.5)
    writer.add_array("a.strings", ["one", "", "three" * 100])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.nested", [[1, 2], [3]])
    writer.add_string("a.template", "x" * 100_000)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.arange(32, dtype=np.float32))
    writer.add_tensor("blk.1.attn_norm.weight", np.arange(7, dtype=np.float16))
    writer.add_tensor("output_norm.weight", np.arange(5, dtype=np.float64))
    finish(writer)
    return tmp_path / "a.gguf"


def test_agrees_with_the_package(written: Path) -> None:
    found = read_gguf(written)
    theirs = {t.name: t for t in gguf.GGUFReader(written).tensors if len(t.shape) == 1}
    assert {t.name for t in found.tensors} == theirs.keys()
    for tensor in found.tensors:
        assert tensor.start == theirs[tensor.name].data_offset
        assert read_tensor(tensor) == theirs[tensor.name].data.tobytes()
    assert found.values == {
        "general.architecture": "gemma3",
        "general.alignment": 64,
        "gemma3.block_count": 2,
    }
    assert found.size == written.stat().st_size


def test_a_header_longer_than_a_block(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma")
    writer.add_token_list([f"token {'long ' * (n % 9)}{n}" for n in range(100_000)])
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    finish(writer)
    (tensor,) = read_gguf(tmp_path / "a.gguf").tensors
    assert np.frombuffer(read_tensor(tensor), np.float32).tolist() == [1] * 8


class TestDamaged:
    def test_every_truncation(self, written: Path) -> None:
        raw = written.read_bytes()
        start = read_gguf(written).tensors[0].start
        for length in (*range(0, 600), *range(start - 300, len(raw) - 64, 7)):
            written.write_bytes(raw[:length])
            with pytest.raises(CheckpointError) as caught:
                read_gguf(written)
            assert "\n" not in str(caught.value)

    def test_flipped_bytes(self, written: Path) -> None:
        """Whatever is read or refused, nothing else is raised, and memory stays where it was."""
        raw = bytearray(written.read_bytes())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        chance = random.Random(6)
        for _ in range(1500):
            damaged = bytearray(raw)
            for _ in range(chance.randint(1, 4)):
                at = chance.choice((chance.randrange(600), chance.randrange(len(raw))))
                damaged[at] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
            written.write_bytes(damaged)
            try:
                file = open_file(str(written))
                file.values([n for n, t in file.tensors.items() if t.size < 100])
            except GemmaFoldError as error:
                assert "\n" not in str(error)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "ends within its header"),
            (b"GGML" + bytes(40), "no GGUF file"),
            (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version 1"),
            (b"GGUF" + struct.pack(">I", 3) + bytes(40), "version 50331648"),
            (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors"),
            (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "keys"),
            (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "a name has"),
            (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 1 << 60), "strings"),
            (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 1 << 62), "ends within"),
            (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77) + bytes(40), "type 77"),
        ],
    )
    def test_claims(self, content: bytes, words: str, tmp_path: Path) -> None:
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            read_gguf(tmp_path / "a.gguf")

    def test_lists_in_lists(self, tmp_path: Path) -> None:
        deep = struct.pack("<IQ", 9, 1) * 100
        raw = b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 9) + deep
        (tmp_path / "a.gguf").write_bytes(raw)
        with pytest.raises(CheckpointError, match="nested"):
            read_gguf(tmp_path / "a.gguf")

    def test_no_regular_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.gguf")
        for path in (tmp_path / "a.gguf", tmp_path / "none.gguf", tmp_path):
            with pytest.raises(CheckpointError):
                read_gguf(path)

    def test_a_norm_of_gigabytes(self, tmp_path: Path) -> None:
        tensor = struct.pack("<Q11sIQIQ", 11, b"norm.weight", 1, 1 << 30, 0, 0)
        raw = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor
        with open(tmp_path / "a.gguf", "wb") as file:
            file.write(raw)
            file.truncate(5 << 30)  # sparse
        with pytest.raises(CheckpointError, match="elements"):
            read_gguf(tmp_path / "a.gguf")

    def test_unknown_architecture(self, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "who")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(UnsupportedModelError, match="'who'"):
            open_file(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize("name", ["recurrent_gemma", "recurrent-gemma", "griffin", "VaultGemma"])
def test_an_architecture_that_llama_cpp_does_not_convert(name: str, tmp_path: Path) -> None:
    """What a fork adds to its norms, nobody says."""
    assert name not in gguf.MODEL_ARCH_NAMES.values()
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    done = run_here("check", tmp_path / "a.gguf")
    assert (done.returncode, done.stdout) == (3, "")
    assert f"architecture '{name}', which llama.cpp's converter does not know" in done.stderr
    assert done.stderr.count("\n") == 1


#: Norms of the rules that llama.cpp's converter leaves out, or spells in its own way.
_NOT_IN_GGUF = ("mtp.", "enorm", "hnorm", "shared_head", "image_proj")


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"clip"}))
def test_names_are_those_of_llama_cpp(name: str) -> None:
    """Every zero-centred or plain norm of a family, by the package's own tensor map."""
    arch = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}.get(name)
    if arch is None:
        pytest.skip(f"gguf {gguf.__name__} does not know {name} yet")
    row = ARCHITECTURES[name]
    values = {f"{name}.block_count": 2}
    theirs = get_tensor_name_map(arch, 2)
    names = {
        known: stored
        for known, (_, stored) in theirs.mapping.items()
        if stored.rpartition(".")[2] in {*row.blocks, *row.top}
    }
    found = {transformers_name(s + ".weight", row, name, values) for s in names.values()}
    assert None not in found
    for ours in found:
        assert ours is not None
        stem = ours.removesuffix(".weight")
        stored = names.get(stem) or names.get(ours)
        assert stored is not None, f"llama.cpp knows no {ours}"
        assert transformers_name(stored + ".weight", row, name, values) == ours
    kinds = classify(config_of(row, name, values), {n: (4,) for n in found if n})
    assert kinds.verdict.value != "unsupported", kinds.reason


def test_draft_layers_follow_the_models_own() -> None:
    row, values = (
        ARCHITECTURES["qwen35"],
        {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1},
    )

    def called(stored: str) -> str | None:
        return transformers_name(stored, row, "qwen35", values)

    assert called("blk.3.attn_norm.weight") == "model.layers.3.input_layernorm.weight"
    assert called("blk.4.attn_norm.weight") == "mtp.layers.0.input_layernorm.weight"
    assert called("blk.4.nextn.enorm.weight") == "mtp.pre_fc_norm_embedding.weight"
    assert called("blk.3.nextn.enorm.weight") is None
    assert called("blk.3.attn_norm.bias") is None


def test_draft_layers_of_qwen4() -> None:
    """Its norms outside of the layers are in the draft's block, as `nextn`."""
    row, values = (
        ARCHITECTURES["qwen4exp"],
        {"qwen4exp.block_count": 3, "qwen4exp.nextn_predict_layers": 1},
    )
    names = {
        "blk.2.nextn.enorm": "mtp.pre_fc_norm_embedding",
        "blk.2.nextn.hnorm": "mtp.pre_fc_norm_hidden",
        "blk.2.nextn.hc_head_norm": "mtp.hyper_connection_mixer.hc_norm",
        "blk.2.attn_q_norm": "mtp.layers.0.self_attn.q_norm",
        "blk.2.indexer.k_norm": "mtp.layers.0.self_attn.indexer.k_layernorm",
        "blk.2.hc_ffn_norm": "mtp.layers.0.mlp_hyper_connection.hc_norm",
        "blk.1.hc_ffn_norm": "model.layers.1.mlp_hyper_connection.hc_norm",
        "output_hc_norm": "model.hyper_connection_mixer.hc_norm",
    }
    found = {s: transformers_name(f"{s}.weight", row, "qwen4exp", values) for s in names}
    assert found == {stored: f"{name}.weight" for stored, name in names.items()}
    kinds = classify(config_of(row, "qwen4exp", values), {n: (4,) for n in found.values() if n})
    assert {kinds.rules[n].kind for n in found.values() if n} == {Kind.ZERO_CENTRED}
