"""The norms of a trainer have the bits of the operators, as in vLLM and SGLang, however it runs.

`GEMMA_FOLD_COMPILED=operators` is for a compiled trainer: a compiler sums in an order of its own.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from norm_checks import rows
from torch import Tensor, nn

pytest.importorskip("transformers")
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

import gemma_fold
from gemma_fold import ops
from gemma_fold.engines.transformers import layers, norms

IDS = torch.arange(3, 35).view(2, 16)
WIDE = 5376  # where a compiler's own sum differs in some rows


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_training_says_what_evaluation_says() -> None:
    """Fused or not, with gradients or without, layer by layer or checkpointed."""
    model = gemma_fold.fold_model(tiny.build("gemma3_text", torch.bfloat16))
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
    model.train()
    said = model(IDS, use_cache=False).logits
    model.gradient_checkpointing_enable()
    checkpointed = model(IDS, use_cache=False).logits
    (checkpointed.float().square().mean()).backward()
    for norm in model.modules():
        if isinstance(norm, norms.FoldedNorm):
            assert norm.gain.grad is not None and norm.gain.grad.any()
            norm.register_forward_hook(lambda *_: None)  # keeps it from being fused
    assert torch.equal(said, expected)
    assert torch.equal(checkpointed, expected)
    assert torch.equal(model(IDS, use_cache=False).logits, expected)


def wide_norms() -> list[norms.FoldedNorm]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Gemma3RMSNorm(WIDE) for _ in range(2))).bfloat16()
    for norm in model:
        nn.init.normal_(norm.weight)
    return list(gemma_fold.fold_model(model))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_compiled_norms_as_operators_have_the_bits_of_eager_mode(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "AS_OPERATORS", True)
    post, pre = wide_norms()
    x, residual = (rows((256, WIDE), torch.bfloat16, seed, "cpu") for seed in (1, 2))

    def run(x: Tensor, residual: Tensor) -> list[Tensor]:
        return [post(x), *layers._sandwich(x, residual, True, post, pre, None)]

    torch._dynamo.reset()
    with torch.set_grad_enabled(trained):
        found = torch.compile(run, fullgraph=True)(x, residual)
    gammas = [norm.gain.detach().view(-1) for norm in (post, pre)]
    normed, total = ops.rms_norm_add_rms_norm(x, residual, *gammas, post.epsilon, pre.epsilon)
    expected = [ops.rms_norm(x, gammas[0], post.epsilon), total, normed]
    for got, want in zip(found, expected, strict=True):
        assert got.requires_grad == trained
        assert torch.equal(got, want)
