"""What users do around `fold_model`: optimizers, transforms, adapters, parametrizations."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize

import gemma_fold
from gemma_fold.commands.convert import convert
from gemma_fold.commands.verify import verify
from gemma_fold.engines.transformers import install
from gemma_fold.engines.transformers.norms import FoldedNorm
from gemma_fold.errors import UnsupportedModelError

install()

IDS = torch.randint(3, 88, (2, 9), generator=torch.Generator().manual_seed(0))


def gains(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: m.gain for n, m in model.named_modules() if isinstance(m, FoldedNorm)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


class TestAnOptimizerMadeBefore:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_trains_the_norms_of_the_folded_model(self, dtype: torch.dtype) -> None:
        model = tiny.build("gemma3_text", dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0)
        gemma_fold.fold_model(model)
        before = {name: gain.detach().clone() for name, gain in gains(model).items()}
        step(model, optimizer)
        assert len(before) == 13
        for name, gain in gains(model).items():
            assert gain.dtype == torch.float32
            # The first step of Adam is lr in the direction of the gradient, whatever its size.
            moved = (gain.detach() - before[name]).abs()
            torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=1e-2, atol=0)

    def test_it_trains_the_norms_of_the_unfolded_model(self) -> None:
        model = gemma_fold.fold_model(tiny.build("gemma3_text", torch.float32))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gemma_fold.unfold_model(model)
        before = model.model.norm.weight.detach().clone()
        step(model, optimizer)
        assert not torch.equal(model.model.norm.weight, before)

    def test_gradients_made_before_are_kept(self) -> None:
        model = tiny.build("gemma3_text", torch.bfloat16)
        model(input_ids=IDS, labels=IDS).loss.backward()
        expected = model.model.norm.weight.grad.clone()
        gain = gemma_fold.fold_model(model).model.norm.gain
        assert torch.equal(gain.grad[:, 0], expected.float())
        gemma_fold.unfold_model(model)
        assert torch.equal(model.model.norm.weight.grad, expected)

    def test_a_weight_shared_with_another_module_is_left_to_that_module(self) -> None:
        model = tiny.build("gemma3_text", torch.float32)
        model.other = nn.LayerNorm(32)
        model.other.weight = model.model.norm.weight
        raw = model.model.norm.weight.detach().clone()
        gemma_fold.fold_model(model)
        assert torch.equal(model.other.weight, raw)
        assert torch.equal(model.model.norm.gain[:, 0], 1 + raw)

    def test_an_optimizer_that_has_stepped_does_not_go_on_silently(self) -> None:
        model = tiny.build("gemma3_text", torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        step(model, optimizer)
        gemma_fold.fold_model(model)
        with pytest.raises(RuntimeError):
            step(model, optimizer)


class TestFunctionTransforms:
    def models(self) -> tuple[nn.Module, nn.Module]:
        model = tiny.build("gemma3_text", torch.float32)
        return model, gemma_fold.fold_model(tiny.build("gemma3_text", torch.float32))

    def test_a_tangent_through_the_model(self) -> None:
        tangents = []
        for model in self.models():
            embedded = model.get_input_embeddings()(IDS).detach()
            direction = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(1))

            def run(x: torch.Tensor, model: Any = model) -> torch.Tensor:
                return model(inputs_embeds=x, use_cache=False, attn_implementation="eager").logits

            model.config._attn_implementation = "eager"
            tangents.append(torch.func.jvp(run, (embedded,), (direction,))[1])
        assert tangents[0].abs().max() > 0.01
        torch.testing.assert_close(tangents[1], tangents[0], rtol=1e-4, atol=1e-5)

    def test_gradients_per_sample(self) -> None:
        gradients = []
        for model in self.models():
            model.config._attn_implementation = "eager"
            names = [name for name, _ in model.named_parameters() if "norm" in name]
            trained = {n: p.detach() for n, p in model.named_parameters() if n in names}

            def loss(
                weights: dict[str, torch.Tensor], x: torch.Tensor, model: Any = model
            ) -> torch.Tensor:
                given = {"inputs_embeds": x[None], "use_cache": False}
                return torch.func.functional_call(model, weights, (), given).logits.square().mean()

            embedded = model.get_input_embeddings()(IDS).detach()
            per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, embedded)
            gradients.append({name: one.flatten(1) for name, one in per_sample.items()})
        assert gradients[0].keys() == gradients[1].keys()
        for name, expected in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft reads it
class TestAdaptersWithTrainedNorms:
    @pytest.mark.parametrize("where", ["original", "folded"])
    def test_load_adapter(self, where: str, tmp_path: Path) -> None:
        import peft

        config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["norm"])
        base = tiny.build("gemma3_text", torch.float32)
        trained = peft.get_peft_model(
            base if where == "original" else gemma_fold.fold_model(base), config
        )
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.25)
        trained.save_pretrained(tmp_path / "adapter")
        expected = logits(trained.eval())
        model = gemma_fold.fold_model(tiny.build("gemma3_text", torch.float32))
        before = logits(model)
        model.load_adapter(str(tmp_path / "adapter"))
        assert not torch.equal(expected, before)
        torch.testing.assert_close(logits(model), expected)


class TestParametrizedNorms:
    def test_casts_and_saving(self, tmp_path: Path) -> None:
        class Doubled(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * x

        model = gemma_fold.fold_model(tiny.build("gemma3_text", torch.float32))
        gain = model.model.norm.gain.detach().clone()
        parametrize.register_parametrization(model.model.norm, "weight", Doubled())
        model.to(torch.bfloat16)
        assert model.model.norm.gain.dtype == torch.float32
        assert torch.equal(model.model.norm.gain, 2 * gain)
        assert torch.isfinite(logits(model)).all()
        with pytest.raises(UnsupportedModelError, match="remove_parametrizations first"):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        parametrize.remove_parametrizations(model.model.norm, "weight")
        assert type(model.model.norm) is FoldedNorm
        model.save_pretrained(tmp_path / "saved")
        assert verify(tmp_path / "saved").problems == ()
        torch.testing.assert_close(
            gemma_fold.load(tmp_path / "saved").model.norm.gain, 2 * gain, rtol=0, atol=2**-21
        )


class TestPrograms:
    def test_a_converter_that_adds_one_reads_the_original(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As CTranslate2's does, with which `tests/loaders` runs the same."""
        source = tiny.save("gemma3_text", tmp_path / "source", torch.bfloat16)
        convert(source, tmp_path / "folded")

        class TransformersConverter:
            def load_model(self, cls: Any, name: str, **kwargs: Any) -> Any:
                return cls.from_pretrained(name, **kwargs)

            def gains(self, folder: Path) -> dict[str, torch.Tensor]:
                config = transformers.AutoConfig.from_pretrained(folder)
                model = self.load_model(transformers.AutoModelForCausalLM, folder, config=config)
                weights = model.named_parameters()
                return {name: w.data + 1.0 for name, w in weights if "norm" in name}

        expected = TransformersConverter().gains(source)
        module = types.ModuleType("ctranslate2.converters.transformers")
        module.TransformersConverter = TransformersConverter  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for folder in (source, tmp_path / "folded", tmp_path / "folded"):
            found = TransformersConverter().gains(folder)
            assert found.keys() == expected.keys() and len(found) == 13
            assert all(torch.equal(found[name], expected[name]) for name in found)
