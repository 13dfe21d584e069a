"""The raw w for an engine's own norms: what casting the original once gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_fold.commands.convert import convert
from gemma_fold.engines import weights
from gemma_fold.engines.weights import original_weight
from gemma_fold.format.manifest import FoldedTensor, read_manifest

NAME = "model.norm.weight"
CONFIG = (
    '{"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 0}'
)


def folded_norm(w: torch.Tensor, root: Path) -> tuple[torch.Tensor, FoldedTensor]:
    """The gamma that `convert` makes of the norm weight `w`, and what the manifest says of it."""
    (root / "source").mkdir()
    (root / "source" / "config.json").write_text(CONFIG)
    save_file(
        {NAME: w, "model.embed_tokens.weight": torch.zeros(1, 1)},
        root / "source" / "model.safetensors",
    )
    convert(root / "source", root / "folded")
    gamma = load_file(root / "folded" / "model.safetensors")[NAME]
    return gamma[:, 0], read_manifest(root / "folded").tensors[NAME]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("served", [torch.bfloat16, torch.float16, torch.float32])
def test_it_rounds_once(stored: torch.dtype, served: torch.dtype, tmp_path: Path) -> None:
    w = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    w[:4] = torch.tensor([0.0, -0.0, 1e-9, -1e-30])
    w = w.to(stored)
    gamma, folded = folded_norm(w, tmp_path)
    ours = original_weight(gamma, folded).to(served)
    assert torch.equal(ours, w.to(served))
    if (stored, served) == (torch.float32, torch.bfloat16):  # or this test shows nothing
        assert not torch.equal(weights.unfold(gamma, 1.0, served), w.to(served))


def test_a_gamma_that_was_trained_since_is_not_replaced(tmp_path: Path) -> None:
    w = 0.02 * torch.randn(1 << 12, generator=torch.Generator().manual_seed(0))
    gamma, folded = folded_norm(w, tmp_path)
    trained = gamma.clone()
    trained[::2] += 0.5
    ours = original_weight(trained, folded)
    assert torch.equal(ours[1::2], w[1::2])
    assert torch.equal(ours[::2], trained[::2] - 1)
