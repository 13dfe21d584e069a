"""Folded transformers models on a GPU: every sandwich is fused, and the logits stay. ``-m gpu``."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import tiny
import torch

import gemma_fold

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
IDS = torch.tensor([[2, 9, 31, 7, 50, 3, 18, 44]])
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def built(family: str, dtype: torch.dtype) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny.build(family, dtype).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits.double().cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ("gemma", "gemma2", "gemma3_text"))
def test_fused_layers_are_as_near_to_the_exact_logits(
    family: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    exact = logits(built(family, dtype).double())
    model = built(family, dtype).cuda()
    before = logits(model)
    with caplog.at_level(logging.INFO, "gemma_fold"):
        gemma_fold.fold_model(model)
    if family != "gemma":
        assert "4 of 4 sandwiches fused" in caplog.text, caplog.text
    after = logits(model)
    allowed = 1.5 * (before - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (after - exact).abs().max() <= allowed
    assert (before - exact).abs().max() > 0  # a model in float64 would tell nothing


def test_generation_is_the_originals() -> None:
    original = built("gemma3_text", torch.float32).cuda()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = original.generate(IDS.cuda(), **options)
    folded = gemma_fold.fold_model(built("gemma3_text", torch.float32).cuda())
    assert torch.equal(folded.generate(IDS.cuda(), **options), want)
