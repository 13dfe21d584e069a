"""The real Gemma 3 270M; the oracle is its GGUF file, whose norms llama.cpp folded in float32."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from checkpoints import read_tensors, tree

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
