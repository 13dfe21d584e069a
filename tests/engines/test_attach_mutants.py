"""Changed forwards of real layers: fused where that is safe, left alone with a reason where not.

The oracle is the mutant itself, run by the model before it is folded: every bit has to be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutants
import pytest
import tiny
import torch
from torch import nn

from gemma_fold.engines.transformers import layers as sandwich
from gemma_fold.engines.transformers.norms import FoldedNorm
from gemma_fold.engines.transformers.weights import unfold_model, zero_centred_norms

#: The layer that is tried among the fast tests; the others are slow.
FAST = "Gemma3DecoderLayer"
TARGETS = [
    pytest.param(target, id=target.cls, marks=[pytest.mark.slow] if target.cls != FAST else [])
    for target in mutants.TARGETS
    if target.family in tiny.available()
]
#: Below this a change of the generator has gone wrong.
FEWEST = 200


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def model(family: str) -> Any:
        if family not in made:
            made[family] = tiny.build(family, torch.bfloat16)
        return made[family]

    return model


def layers_of(model: nn.Module, cls: type) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) is cls]


def outcome(model: Any, family: str) -> Any:
    """All that a forward pass returns, or the kind of error that it ends in."""
    inputs = tiny.inputs(family, torch.bfloat16)
    try:
        with torch.no_grad():
            alone = model(**inputs, use_cache=False).logits  # layers do each other's norms
            result = model(**inputs, output_hidden_states=True, use_cache=False)
    except Exception as error:
        return type(error)
    states = [
        state
        for name, value in result.items()
        if "hidden_states" in name and isinstance(value, tuple)
        for state in value
    ]
    return [alone, result.logits, *states]


def same(one: Any, two: Any) -> bool:
    if isinstance(one, type) or isinstance(two, type):
        return one is two
    return len(one) == len(two) and all(
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(one, two, strict=True)
    )


def fuse(model: Any) -> sandwich.Fusion:
    for module, fold in zero_centred_norms(model):
        FoldedNorm.adopt(module, fold)
    return sandwich.fuse_layers(model)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_mutant(target: mutants.Target, models: Any, tmp_path: Path) -> None:
    model = models(target.family)
    real = next(type(m) for m in model.modules() if type(m).__name__ == target.cls)
    layers = layers_of(model, real)
    plain = outcome(model, target.family)
    epsilon = layers[0].post_feedforward_layernorm.eps
    made = mutants.mutants(target)
    assert len(made) >= FEWEST
    assert len({str(mutant) for mutant in made}) == len(made)
    wrong, different, refused = [], 0, 0
    for mutant in made:
        cls = mutant.load(tmp_path)
        for layer in layers:
            layer.__class__ = cls
        before = outcome(model, target.family)
        fusion = fuse(model)
        shapes = [x.shape for x in model.modules() if isinstance(x, sandwich.SandwichLayer)]
        after = outcome(model, target.family)
        unfold_model(model)
        for layer in layers:
            layer.__class__ = real
            layer.__dict__.pop("seen", None)
        for norm, _ in zero_centred_norms(model):
            norm.eps = epsilon  # one of the mutants changes it
        mine = [shape for shape in shapes if shape.base is cls]
        fused = fusion.fused - sum(x.sandwiches for x in shapes if x.base is not cls)
        expected = len(target.pairs) * len(layers)
        different += not same(before, plain)
        refused += fused < expected
        if not same(before, after):
            wrong.append(f"{mutant}: other results")
        if mutant.expect == "full" and fused != expected:
            wrong.append(f"{mutant}: {fused} of {expected} fused: {_reasons(fusion, cls)}")
        if mutant.expect == "less" and fused >= expected:
            wrong.append(f"{mutant}: all fused")
        if fused < expected and not _reasons(fusion, cls):
            wrong.append(f"{mutant}: not fused and no reason")
        if fused and not mine:
            wrong.append(f"{mutant}: counted as fused, and is not")
    print(
        f"{target.cls}: {len(made)} mutants, {different} of them other results than the layer's "
        f"own, {refused} not fully fused, {len(wrong)} wrong"
    )
    assert not wrong, "\n".join(wrong)
    assert different > 50 and refused > 50


def _reasons(fusion: sandwich.Fusion, cls: type) -> list[str]:
    return [str(m) for m in fusion.missing if m.where == f"{cls.__name__}.forward" and m.reason]
