"""Every family, folded, says bit for bit what the original says: on disk and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import gemma_fold
from gemma_fold.commands.convert import convert
from gemma_fold.engines.transformers.norms import FoldedNorm

pytestmark = pytest.mark.slow

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
FAMILIES = pytest.mark.parametrize("family", tiny.available())


def outputs(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Every floating-point tensor of a forward pass."""
    torch.manual_seed(0)  # pi0 draws noise where it is given none
    with torch.no_grad():
        result = model(**inputs)
    values = [result] if isinstance(result, torch.Tensor) else list(result.values())
    found = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert found
    return found


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
        assert bool(torch.isfinite(one).all())


def aligned(model: Any) -> Any:
    """Copy the weights out of the mapped files.

    Some CPU matrix products give other last bits for other alignments, and fp32 weights are used
    where they lie in the file.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def generated(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    prompt = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    return model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)


def folded_norms(model: nn.Module) -> int:
    return sum(isinstance(module, FoldedNorm) for module in model.modules())


@FAMILIES
@DTYPES
def test_a_folded_checkpoint_says_what_the_original_says(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = tiny.save(family, tmp_path / "source", dtype)
    report = convert(source, tmp_path / "folded")
    original = aligned(type(tiny.build(family)).from_pretrained(source))
    folded = aligned(gemma_fold.load(tmp_path / "folded"))
    assert type(folded) is type(original)
    assert folded_norms(folded) == report.tensors > 0
    inputs = tiny.inputs(family, dtype)
    assert_same(outputs(original, inputs), outputs(folded, inputs))
    if original.can_generate():
        assert torch.equal(generated(original, inputs), generated(folded, inputs))


@FAMILIES
@DTYPES
def test_folding_in_memory_and_back_keeps_every_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny.build(family, dtype)
    inputs = tiny.inputs(family, dtype)
    before = outputs(model, inputs)
    types = [type(module) for module in model.modules()]
    gemma_fold.fold_model(model)
    assert folded_norms(model) > 0
    assert_same(before, outputs(model, inputs))
    gemma_fold.unfold_model(model)
    assert [type(module) for module in model.modules()] == types
    assert_same(before, outputs(model, inputs))


@FAMILIES
def test_a_gain_of_each_family_matters(family: str) -> None:
    # Without this, two models that ignore their norms would pass every test above.
    model = gemma_fold.fold_model(tiny.build(family))
    inputs = tiny.inputs(family)
    before = outputs(model, inputs)
    silent = []
    for name, module in model.named_modules():
        if isinstance(module, FoldedNorm):
            with torch.no_grad():
                module.gain.mul_(1.5)
            after = outputs(model, inputs)
            if all(torch.equal(one, two) for one, two in zip(before, after, strict=True)):
                silent.append(name)
            with torch.no_grad():
                module.gain.div_(1.5)
    assert not silent


@FAMILIES
def test_a_saved_model_is_a_folded_checkpoint(family: str, tmp_path: Path) -> None:
    from gemma_fold.commands.unfold import unfold
    from gemma_fold.commands.verify import verify

    tiny.save(family, tmp_path / "source", torch.bfloat16)
    convert(tmp_path / "source", tmp_path / "folded")
    model = gemma_fold.load(tmp_path / "folded")
    model.save_pretrained(tmp_path / "saved")
    assert verify(tmp_path / "saved").problems == ()
    inputs = tiny.inputs(family, torch.bfloat16)
    expected = outputs(aligned(model), inputs)
    assert_same(expected, outputs(aligned(gemma_fold.load(tmp_path / "saved")), inputs))
    unfold(tmp_path / "saved", tmp_path / "plain")
    plain = aligned(type(model).from_pretrained(tmp_path / "plain"))
    assert_same(expected, outputs(plain, inputs))


@DTYPES
def test_the_real_270m(real_270m: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    import transformers

    convert(real_270m, tmp_path / "folded")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folded")
    inputs = tokenizer(
        "The capital of France is Paris. The capital of Italy is", return_tensors="pt"
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    original, folded = (
        load(real_270m, dtype=dtype),
        gemma_fold.load(tmp_path / "folded", dtype=dtype),
    )
    assert folded_norms(folded) == 109
    assert_same(outputs(original, inputs), outputs(folded, inputs))
    texts = [
        tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])
        for model in (original, folded)
    ]
    assert texts[0] == texts[1]
    assert "Rome" in texts[1]
