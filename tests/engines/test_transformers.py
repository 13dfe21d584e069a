"""A folded checkpoint in transformers: every way in, what users then do to the model, and out."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from hubserver import HubServer
from safetensors.torch import load_file, save_file
from tokenizers_made import tiny_tokenizer
from torch import nn

import gemma_fold
from gemma_fold.commands.convert import convert
from gemma_fold.commands.unfold import unfold
from gemma_fold.commands.verify import verify
from gemma_fold.engines.transformers import install
from gemma_fold.engines.transformers import layers as sandwich
from gemma_fold.engines.transformers.norms import FoldedNorm
from gemma_fold.errors import AlreadyFoldedError, CheckpointError, NothingToFoldError, UsageError

install()

FAMILIES = ("gemma2", "gemma3_text", "qwen3_next")
IDS = torch.randint(3, 88, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`{family}` and `{family}-folded`, bf16, for each of FAMILIES."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        tiny.save(family, root / family, torch.bfloat16)
        convert(root / family, root / f"{family}-folded")
    return root


@pytest.fixture
def source(checkpoints: Path) -> Path:
    return checkpoints / "gemma3_text"


@pytest.fixture
def folded(checkpoints: Path) -> Path:
    return checkpoints / "gemma3_text-folded"


def original(source: Path, **kwargs: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(source, **kwargs)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def norms(model: nn.Module) -> dict[str, FoldedNorm]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FoldedNorm)}


def gammas(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: norm.gain.detach().clone() for name, norm in norms(model).items()}


def assert_folded(model: nn.Module, count: int = 13) -> None:
    found = norms(model)
    assert len(found) == count
    for norm in found.values():
        assert norm.gain.dtype == torch.float32
        assert norm.gain.dim() == 2 and norm.gain.shape[1] == 1


class TestLoading:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_load_gives_the_original_bit_for_bit(
        self, checkpoints: Path, family: str, dtype: torch.dtype
    ) -> None:
        expected = original(checkpoints / family, dtype=dtype)
        model = gemma_fold.load(checkpoints / f"{family}-folded", dtype=dtype)
        assert type(model) is type(expected)
        assert model.dtype == dtype
        assert not model.training
        assert torch.equal(logits(model), logits(expected))
        with torch.inference_mode():
            assert torch.equal(model(input_ids=IDS).logits, logits(expected))
        arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(IDS, **arguments), expected.generate(IDS, **arguments))

    def test_the_dtype_is_the_original_one_and_gamma_is_not(self, folded: Path) -> None:
        model = gemma_fold.load(folded)
        assert model.dtype == torch.bfloat16
        assert_folded(model)
        stored = load_file(folded / "model.safetensors")
        for name, gamma in gammas(model).items():
            assert torch.equal(gamma, stored[f"{name}.weight"])

    def test_a_config_without_dtype_does_not_become_fp32(
        self, source: Path, tmp_path: Path
    ) -> None:
        bare = shutil.copytree(source, tmp_path / "bare")
        config = json.loads((bare / "config.json").read_text())
        del config["dtype"]
        (bare / "config.json").write_text(json.dumps(config))
        convert(bare, tmp_path / "folded")
        assert gemma_fold.load(tmp_path / "folded").dtype == torch.bfloat16

    @pytest.mark.parametrize("name", ["AutoModelForCausalLM", "Gemma3ForCausalLM"])
    def test_auto_and_concrete_classes(self, source: Path, folded: Path, name: str) -> None:
        model = getattr(transformers, name).from_pretrained(folded)
        assert_folded(model)
        assert torch.equal(logits(model), logits(original(source)))

    def test_a_base_model_without_its_head(self, source: Path, folded: Path) -> None:
        model = transformers.AutoModel.from_pretrained(folded)
        expected = transformers.AutoModel.from_pretrained(source)
        assert_folded(model)
        with torch.no_grad():
            assert torch.equal(model(IDS).last_hidden_state, expected(IDS).last_hidden_state)

    def test_configs_are_the_native_ones(self, source: Path, folded: Path) -> None:
        ours, expected = (
            transformers.AutoConfig.from_pretrained(path).to_dict() for path in (folded, source)
        )
        assert ours.pop("_name_or_path", "") != expected.pop("_name_or_path", None)
        assert ours == expected

    def test_pipeline(self, source: Path, folded: Path) -> None:
        tokenizer = tiny_tokenizer()
        texts = [
            transformers.pipeline("text-generation", model=str(path), tokenizer=tokenizer)(
                "w5 w7 w11", max_new_tokens=6, do_sample=False
            )
            for path in (source, folded)
        ]
        assert texts[0] == texts[1]

    def test_without_the_tensor_lock(self, source: Path, tmp_path: Path) -> None:
        convert(source, tmp_path / "folded", tensor_lock=False)
        model = gemma_fold.load(tmp_path / "folded")
        assert_folded(model)
        assert torch.equal(logits(model), logits(original(source)))

    def test_shards(self, tmp_path: Path) -> None:
        model = tiny.build("gemma3_text", torch.bfloat16)
        model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
        assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
        convert(tmp_path / "source", tmp_path / "folded")
        expected = original(tmp_path / "source")
        assert torch.equal(logits(gemma_fold.load(tmp_path / "folded")), logits(expected))

    def test_an_original_loads_as_ever(self, source: Path) -> None:
        assert not norms(original(source))

    def test_from_the_hub(
        self, source: Path, folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with HubServer() as hub:
            hub.add("someone/tiny", folded)
            hub.use(monkeypatch, tmp_path / "home")
            model = gemma_fold.load("someone/tiny")
            again = gemma_fold.load("someone/tiny@main")
        assert_folded(model)
        assert torch.equal(logits(model), logits(original(source)))
        assert torch.equal(logits(again), logits(model))

    @pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
    def test_fp8_originals_keep_their_quantization(self, family: str, tmp_path: Path) -> None:
        tiny.save(family, tmp_path / "bf16", torch.bfloat16)
        fp8_copy(tmp_path / "bf16", tmp_path / "fp8")
        convert(tmp_path / "fp8", tmp_path / "folded")
        option = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
        expected = original(tmp_path / "fp8", **option)
        model = gemma_fold.load(tmp_path / "folded", **option)
        assert_folded(model, 13 if family == "gemma3_text" else 9)
        assert torch.equal(logits(model), logits(expected))


class TestInMemory:
    def test_fold_and_unfold(self, source: Path) -> None:
        model = original(source)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = logits(model)
        assert gemma_fold.fold_model(model) is model
        assert_folded(model)
        assert torch.equal(logits(model), expected)
        assert gemma_fold.unfold_model(model) is model
        assert torch.equal(logits(model), expected)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
            assert tensor.dtype == before[name].dtype

    def test_an_fp32_checkpoint_loaded_in_bf16_is_rounded_once(
        self, source: Path, tmp_path: Path
    ) -> None:
        wide = tiny.with_norms_near_0(source, tmp_path / "wide")
        convert(wide, tmp_path / "folded")
        model = gemma_fold.unfold_model(gemma_fold.load(tmp_path / "folded", dtype=torch.bfloat16))
        expected = original(wide, dtype=torch.bfloat16).state_dict()
        assert model.state_dict().keys() == expected.keys()
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[name]), name

    def test_gamma_is_one_plus_w(self, source: Path) -> None:
        model = original(source)
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if "norm" in n}
        gemma_fold.fold_model(model)
        for name, gamma in gammas(model).items():
            assert torch.equal(gamma[:, 0], 1 + weights[f"{name}.weight"].float())

    def test_twice_is_refused(self, source: Path) -> None:
        model = gemma_fold.fold_model(original(source))
        with pytest.raises(AlreadyFoldedError, match="folded already"):
            gemma_fold.fold_model(model)

    def test_a_model_without_zero_centred_norms_is_refused(self) -> None:
        config = transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2,
        )  # fmt: skip
        with pytest.raises(NothingToFoldError, match="no zero-centred norm"):
            gemma_fold.fold_model(transformers.LlamaForCausalLM(config))

    def test_a_class_of_the_same_name_elsewhere_is_left_alone(self) -> None:
        class Gemma3RMSNorm(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.eps = 1e-6
                self.weight = nn.Parameter(torch.ones(4))

        with pytest.raises(NothingToFoldError):
            gemma_fold.fold_model(nn.Sequential(Gemma3RMSNorm()))

    def test_an_original_state_dict_can_be_loaded_into_a_folded_model(self, source: Path) -> None:
        # [H] is a raw w, and becomes a gamma on the way in; this is what trainers push.
        model = gemma_fold.fold_model(tiny.build("gemma3_text", torch.bfloat16, seed=5))
        raw = original(source)
        model.load_state_dict(raw.state_dict())
        assert_folded(model)
        assert torch.equal(
            gammas(model)["model.norm"], gammas(gemma_fold.fold_model(raw))["model.norm"]
        )

    def test_a_folded_state_dict_cannot_be_loaded_into_an_original(self, source: Path) -> None:
        state = gemma_fold.fold_model(original(source)).state_dict()
        with pytest.raises(RuntimeError, match="size mismatch"):
            original(source).load_state_dict(state, strict=False)


class TestWhatUsersDo:
    @pytest.mark.parametrize(
        ("cast", "dtype"),
        [
            (lambda m: m.to(torch.bfloat16), torch.bfloat16),
            (lambda m: m.half(), torch.float16),
            (lambda m: m.bfloat16().float(), torch.float32),
            (lambda m: m.double(), torch.float64),
            (lambda m: m.to("cpu", torch.float16), torch.float16),
        ],
        ids=["to", "half", "there and back", "double", "device and dtype"],
    )
    def test_casts_leave_gamma_alone(
        self, folded: Path, cast: Callable[[Any], Any], dtype: torch.dtype
    ) -> None:
        model = gemma_fold.load(folded, dtype=torch.float32)
        before = gammas(model)
        model = cast(model)
        assert model.model.embed_tokens.weight.dtype == dtype
        assert_folded(model)
        for name, gamma in gammas(model).items():
            assert torch.equal(gamma, before[name])
        assert torch.isfinite(logits(model)).all()

    def test_a_cast_folded_model_is_the_cast_original(self, source: Path, folded: Path) -> None:
        # Stored as bf16: computing in fp16 and back, and gamma must not have been rounded.
        model = gemma_fold.load(folded, dtype=torch.float32).bfloat16()
        expected = original(source, dtype=torch.float32).bfloat16()
        assert torch.equal(logits(model), logits(expected))

    def test_meta_and_back(self, folded: Path) -> None:
        norm = gemma_fold.load(folded).model.norm
        state = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
        x = torch.randn(3, 32)
        expected = norm(x)
        norm.to("meta", torch.bfloat16)
        assert norm.gain.is_meta and norm.gain.dtype == torch.float32
        norm.load_state_dict(state, assign=True)
        assert torch.equal(norm(x), expected)

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, folded: Path, tmp_path: Path, copier: Callable[[Any], Any]) -> None:
        model = gemma_fold.load(folded)
        twin = copier(model)
        assert_folded(twin)
        assert torch.equal(logits(twin), logits(model))
        with torch.no_grad():
            for norm in norms(twin).values():
                norm.gain.mul_(2)
        assert not torch.equal(logits(twin), logits(model))
        twin.save_pretrained(tmp_path / "twin")
        assert torch.equal(logits(gemma_fold.load(tmp_path / "twin")), logits(twin))

    def test_a_copied_layer_does_not_drag_the_model_along(self, folded: Path) -> None:
        layer = gemma_fold.load(folded).model.layers[0]
        assert (
            len(pickle.dumps(copy.deepcopy(layer)))
            < 2 * sum(p.numel() * p.element_size() for p in layer.parameters()) + 100_000
        )

    @pytest.mark.parametrize("places", [("cpu", "disk"), ("disk", "disk")], ids=str)
    def test_device_map_with_offload(
        self, source: Path, folded: Path, tmp_path: Path, places: tuple[str, str]
    ) -> None:
        device_map = {
            "model.embed_tokens": "cpu",
            "lm_head": "cpu",
            "model.rotary_emb": "cpu",
            "model.layers.0": places[0],
            "model.layers.1": places[1],
            "model.norm": places[1],
        }
        model = gemma_fold.load(folded, device_map=device_map, offload_folder=tmp_path / "off")
        assert any(p.is_meta for p in model.parameters())
        assert torch.equal(logits(model), logits(original(source)))

    def test_device_map_auto(self, source: Path, folded: Path) -> None:
        model = gemma_fold.load(folded, device_map="auto")
        assert_folded(model)
        assert torch.equal(logits(model), logits(original(source)))

    def test_an_offloaded_model_is_not_folded_in_memory(self, source: Path, tmp_path: Path) -> None:
        device_map = {
            "model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu",
            "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
        }  # fmt: skip
        model = original(source, device_map=device_map, offload_folder=tmp_path / "off")
        with pytest.raises(gemma_fold.GemmaFoldError, match="offloading and tensor"):
            gemma_fold.fold_model(model)

    @pytest.mark.slow
    def test_compile_breaks_no_graph_and_does_not_recompile(self, folded: Path) -> None:
        from torch._dynamo.utils import counters

        model = gemma_fold.load(folded)
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            for tokens in (3, 4, 5, 6, 9):
                ids = IDS[:, :tokens]
                expected = model(ids, use_cache=False).logits
                assert torch.equal(compiled(ids, use_cache=False).logits, expected)
        # One graph for the first length, one for every other.
        assert counters["stats"]["unique_graphs"] == 2
        assert not counters["graph_break"]

    @pytest.mark.slow
    def test_compiled_with_inductor(self, folded: Path) -> None:
        model = gemma_fold.load(folded, dtype=torch.float32)
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            for tokens in (5, 9):
                ids = IDS[:, :tokens]
                torch.testing.assert_close(
                    compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
                )

    @pytest.mark.parametrize("family", FAMILIES)
    def test_autocast(self, checkpoints: Path, family: str) -> None:
        results = []
        for model in (
            original(checkpoints / family),
            gemma_fold.load(checkpoints / f"{family}-folded"),
        ):
            with torch.autocast("cpu", torch.bfloat16):
                results.append(logits(model.float()))
        assert torch.equal(*results)

    def test_a_static_cache(self, source: Path, folded: Path) -> None:
        options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
        options["disable_compile"] = True
        assert torch.equal(
            gemma_fold.load(folded).generate(IDS, **options),
            original(source).generate(IDS, **options),
        )


class TestFusedLayers:
    def test_both_layers_are_fused(self, folded: Path) -> None:
        layers = gemma_fold.load(folded).model.layers
        assert all(isinstance(layer, sandwich.SandwichLayer) for layer in layers)
        # Device maps and sharding policies look layers up by this name.
        assert {type(layer).__name__ for layer in layers} == {"Gemma3DecoderLayer"}

    def test_a_forward_it_does_not_know_is_left_alone(
        self, source: Path, folded: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer

        forward = Gemma3DecoderLayer.forward

        def called_through(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(Gemma3DecoderLayer, "forward", called_through)
        model = gemma_fold.load(folded)
        assert not any(isinstance(m, sandwich.SandwichLayer) for m in model.modules())
        assert torch.equal(logits(model), logits(original(source)))

    @pytest.mark.parametrize("where", ["layer", "next layer", "norm", "next norm"])
    def test_hooks_see_and_change_what_they_would(
        self, source: Path, folded: Path, where: str
    ) -> None:
        def shift_output(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            output.add_(0.25)

        def shift_input(module: nn.Module, args: Any) -> None:
            args[0].add_(0.25)

        results = []
        for model in (original(source), gemma_fold.load(folded)):
            first, second = model.model.layers
            if where == "layer":
                first.register_forward_hook(shift_output)
            elif where == "next layer":
                second.register_forward_pre_hook(shift_input)
            elif where == "norm":
                first.post_attention_layernorm.register_forward_hook(shift_output)
            else:
                second.input_layernorm.register_forward_pre_hook(shift_input)
            results.append(logits(model))
        assert torch.equal(*results)

    def test_hidden_states_are_recorded(self, source: Path, folded: Path) -> None:
        states = []
        for model in (original(source), gemma_fold.load(folded)):
            with torch.no_grad():
                states.append(model(IDS, output_hidden_states=True).hidden_states)
        assert len(states[0]) == len(states[1]) == 3
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))

    def test_layers_taken_out_or_swapped(self, source: Path, folded: Path) -> None:
        results = []
        for model in (original(source), gemma_fold.load(folded)):
            one, two = model.model.layers
            model.model.layers = nn.ModuleList([two, one, two])
            model.config.num_hidden_layers = 3
            model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
            with torch.no_grad():
                results.append(model(IDS, use_cache=False).logits)
        assert torch.equal(*results)


class TestTraining:
    def trained(self, model: Any) -> Any:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        return model.eval()

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients_are_those_of_the_original(self, source: Path, checkpointing: bool) -> None:
        gradients = []
        for fold in (False, True):
            model = original(source, dtype=torch.float32).train()
            if fold:
                gemma_fold.fold_model(model)
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(input_ids=IDS, labels=IDS).loss.backward()
            assert all(p.grad is not None for p in model.parameters())
            gradients.append({n: p.grad.flatten() for n, p in model.named_parameters()})
        # d/dw (1 + w) = 1: a gamma has the gradient of its w.
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_what_was_trained_is_saved(
        self, folded: Path, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        model = gemma_fold.load(folded, dtype=dtype)
        before = gammas(model)
        self.trained(model)
        after = gammas(model)
        assert all(not torch.equal(before[name], after[name]) for name in before)
        model.save_pretrained(tmp_path / "trained")
        assert verify(tmp_path / "trained").problems == ()
        again = gemma_fold.load(tmp_path / "trained")
        for name, gamma in gammas(again).items():
            # Within a last bit of w: the format holds only what 1 + w can be.
            torch.testing.assert_close(gamma, after[name], rtol=0, atol=2**-23)
        # That bit grows on its way through the layers.
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
        if dtype == torch.float32:  # in bf16 compute, the original rounds the trained w first
            unfold(tmp_path / "trained", tmp_path / "plain")
            assert torch.equal(logits(original(tmp_path / "plain")), logits(again))

    def test_with_the_trainer(self, folded: Path, tmp_path: Path) -> None:
        model = gemma_fold.load(folded, dtype=torch.float32)
        before = gammas(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=1,
            learning_rate=0.1, report_to=[], save_strategy="steps", save_steps=1, use_cpu=True,
            weight_decay=0.1, disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in IDS]
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        decayed = trainer.get_decay_parameter_names(model)
        assert not any("norm" in name for name in decayed)
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        assert verify(tmp_path / "final").problems == ()
        again = gemma_fold.load(tmp_path / "final")
        assert not torch.equal(gammas(again)["model.norm"], before["model.norm"])
        torch.testing.assert_close(logits(again), logits(model.eval()))
        resumed = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
        torch.testing.assert_close(logits(model.eval()), logits(again))


class TestSaving:
    @pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
    def test_an_offloaded_model(self, source: Path, folded: Path, tmp_path: Path) -> None:
        device_map = {
            "model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu",
            "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk",
        }  # fmt: skip
        model = gemma_fold.load(folded, device_map=device_map, offload_folder=tmp_path / "off")
        model.save_pretrained(tmp_path / "saved")
        assert verify(tmp_path / "saved").problems == ()
        assert torch.equal(logits(gemma_fold.load(tmp_path / "saved")), logits(original(source)))

    @pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one", "shards"])
    def test_what_is_saved_is_format_1(
        self, folded: Path, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        model = gemma_fold.load(folded)
        model.save_pretrained(tmp_path / "saved", **options)
        assert verify(tmp_path / "saved").problems == ()
        config = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert config["model_type"] == "gemma_fold"
        again = gemma_fold.load(tmp_path / "saved")
        assert torch.equal(logits(again), logits(model))
        assert all(torch.equal(g, gammas(model)[n]) for n, g in gammas(again).items())

    def test_a_folded_and_saved_model_unfolds_to_the_plain_save(
        self, source: Path, tmp_path: Path
    ) -> None:
        model = original(source)
        model.save_pretrained(tmp_path / "plain")
        gemma_fold.fold_model(model).save_pretrained(tmp_path / "saved")
        unfold(tmp_path / "saved", tmp_path / "unfolded")
        plain = load_file(tmp_path / "plain" / "model.safetensors")
        back = load_file(tmp_path / "unfolded" / "model.safetensors")
        assert plain.keys() == back.keys()
        assert all(torch.equal(tensor, back[name]) for name, tensor in plain.items())

    def test_files_of_a_user_stay(self, folded: Path, tmp_path: Path) -> None:
        target = tmp_path / "saved"
        (target / "runs").mkdir(parents=True)
        for name in ("config.json.partial", "runs/config.json", "model-2.safetensors.txt"):
            (target / name).write_text("mine")
        for _ in range(2):
            gemma_fold.load(folded).save_pretrained(target)
            assert verify(target).problems == ()
        for name in ("config.json.partial", "runs/config.json", "model-2.safetensors.txt"):
            assert (target / name).read_text() == "mine"

    @pytest.mark.parametrize("place", ["the folder itself", ".", "a link"])
    def test_into_the_folder_it_was_loaded_from(
        self, place: str, folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = Path(shutil.copytree(folded, tmp_path / "copy"))
        (tmp_path / "link").symlink_to(copy)
        monkeypatch.chdir(copy)
        model = gemma_fold.load(copy)
        target = {".": ".", "a link": tmp_path / "link"}.get(place, copy)
        model.save_pretrained(target, max_shard_size="20KB")
        assert verify(copy).problems == () and len(list(copy.glob("*.safetensors"))) > 1
        gemma_fold.load(copy).save_pretrained(target)
        assert verify(copy).problems == () and len(list(copy.glob("*.safetensors"))) == 1
        assert torch.equal(logits(gemma_fold.load(copy)), logits(gemma_fold.load(folded)))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "link"]

    @pytest.mark.parametrize("kind", ["file", "link to nothing", "root", "empty name"])
    def test_into_what_is_no_folder(
        self, kind: str, folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target: Path | str = tmp_path / "target"
        if kind == "file":
            Path(target).write_text("mine")
        elif kind == "link to nothing":
            Path(target).symlink_to("nowhere")
        else:
            target = "/" if kind == "root" else ""
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UsageError):
            gemma_fold.load(folded).save_pretrained(target)
        assert sorted(tmp_path.iterdir()) == before

    def test_plain_save_that_fails_removes_no_manifest(
        self, folded: Path, source: Path, tmp_path: Path
    ) -> None:
        copy = Path(shutil.copytree(folded, tmp_path / "copy"))
        with pytest.raises(TypeError):
            original(source).save_pretrained(copy, max_shard_size=[])
        manifest = (copy / "gemma_fold.json").read_bytes()
        assert manifest == (folded / "gemma_fold.json").read_bytes()
        original(source).save_pretrained(copy)
        assert not (copy / "gemma_fold.json").exists()
        original(source).save_pretrained(tmp_path / "file")
        (tmp_path / "file").rename(tmp_path / "folder")
        (tmp_path / "file").write_text("mine")
        original(source).save_pretrained(tmp_path / "file")  # logs an error, as it always does
        assert (tmp_path / "file").read_text() == "mine"

    def test_over_an_earlier_save(self, folded: Path, source: Path, tmp_path: Path) -> None:
        target = tmp_path / "saved"
        gemma_fold.load(folded).save_pretrained(target)
        gemma_fold.load(folded).save_pretrained(target)
        assert verify(target).problems == ()
        # An unfolded model over a folded one: nothing of the fold may stay behind.
        model = gemma_fold.unfold_model(gemma_fold.load(folded))
        model.save_pretrained(target)
        assert torch.equal(logits(original(target)), logits(original(source)))

    def test_a_cast_state_dict_is_refused(self, folded: Path, tmp_path: Path) -> None:
        model = gemma_fold.load(folded)
        state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError, match="loses bits of gamma"):
            model.save_pretrained(tmp_path / "saved", state_dict=state)
        with pytest.raises(gemma_fold.GemmaFoldError):
            gemma_fold.load(tmp_path / "saved")

    @pytest.mark.parametrize("option", [{"push_to_hub": True}, {"variant": "fp16"}], ids=str)
    def test_options_without_a_place_in_the_format(
        self, folded: Path, tmp_path: Path, option: dict[str, Any]
    ) -> None:
        with pytest.raises(UsageError, match=next(iter(option))):
            gemma_fold.load(folded).save_pretrained(tmp_path / "saved", **option)
        assert not (tmp_path / "saved").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft reads it
class TestAdapters:
    @pytest.fixture
    def adapter(self, source: Path, tmp_path: Path) -> Iterator[Any]:
        """Makes a LoRA adapter on the original, with random B and any options."""
        import peft

        def make(**options: Any) -> tuple[Path, torch.Tensor]:
            config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, **options)
            model = peft.get_peft_model(original(source), config).eval()
            torch.manual_seed(3)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad and ("lora_B" in name or "norm" in name):
                        parameter.normal_(std=0.3)
            model.save_pretrained(tmp_path / "adapter")
            return tmp_path / "adapter", logits(model)

        yield make

    def test_lora_on_top(self, folded: Path, adapter: Any) -> None:
        import peft

        path, expected = adapter()
        model = gemma_fold.load(folded)
        assert torch.equal(logits(peft.PeftModel.from_pretrained(model, path).eval()), expected)

    def test_lora_through_transformers_itself(
        self, source: Path, folded: Path, adapter: Any
    ) -> None:
        path, _ = adapter()
        results = []
        for model in (original(source), gemma_fold.load(folded)):
            before = logits(model)
            model.load_adapter(str(path))
            results.append(logits(model))
            assert not torch.equal(results[-1], before)
        assert torch.equal(*results)

    def test_merged_and_saved(self, folded: Path, adapter: Any, tmp_path: Path) -> None:
        import peft

        path, _ = adapter()
        merged = peft.PeftModel.from_pretrained(gemma_fold.load(folded), path).merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        assert verify(tmp_path / "merged").problems == ()
        again = gemma_fold.load(tmp_path / "merged")
        assert torch.equal(logits(again), logits(merged))

    def test_norm_weights_in_an_adapter_are_folded(self, folded: Path, adapter: Any) -> None:
        import peft

        path, expected = adapter(modules_to_save=["norm", "input_layernorm"])
        model = peft.PeftModel.from_pretrained(gemma_fold.load(folded), path).eval()
        assert torch.equal(logits(model), expected)

    def test_gammas_in_an_adapter_do_not_fit_the_original(
        self, source: Path, folded: Path, tmp_path: Path
    ) -> None:
        import peft

        config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["norm"])
        model = peft.get_peft_model(gemma_fold.load(folded), config)
        model.save_pretrained(tmp_path / "adapter")
        with pytest.raises(RuntimeError, match="size mismatch"):
            peft.PeftModel.from_pretrained(original(source), tmp_path / "adapter")


class TestBadInput:
    @pytest.fixture
    def copied(self, folded: Path, tmp_path: Path) -> Path:
        return shutil.copytree(folded, tmp_path / "copied")

    def edit(self, path: Path, **changes: Any) -> None:
        value = json.loads(path.read_text())
        for key, change in changes.items():
            change(value) if callable(change) else value.__setitem__(key, change)
        path.write_text(json.dumps(value))

    def test_not_folded(self, source: Path) -> None:
        with pytest.raises(CheckpointError, match=r"not a folded checkpoint.*gemma3_text"):
            gemma_fold.load(source)

    def test_no_such_folder_or_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            gemma_fold.load(tmp_path)
        with pytest.raises(CheckpointError, match="does not exist"):
            gemma_fold.load(tmp_path / "nowhere")
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="is a file"):
            gemma_fold.load(tmp_path / "file")

    def test_a_later_format(self, copied: Path) -> None:
        self.edit(copied / "config.json", gemma_fold={"format": 2})
        for loader in (gemma_fold.load, transformers.AutoModelForCausalLM.from_pretrained):
            with pytest.raises(CheckpointError, match=r"format 2.*upgrade gemma-fold"):
                loader(copied)

    def test_a_manifest_of_a_later_format(self, copied: Path) -> None:
        self.edit(copied / "gemma_fold.json", format=7)
        with pytest.raises(CheckpointError, match=r"format 7.*upgrade gemma-fold"):
            gemma_fold.load(copied)

    def test_no_manifest(self, copied: Path) -> None:
        (copied / "gemma_fold.json").unlink()
        with pytest.raises(CheckpointError, match=r"gemma_fold\.json"):
            gemma_fold.load(copied)

    def test_quantized_after_folding(self, copied: Path) -> None:
        """As llm-compressor's `model_free_ptq` leaves it: with scales that nothing would read."""
        self.edit(copied / "config.json", quantization_config={"quant_method": "fp8"})
        with pytest.raises(CheckpointError, match="quantized after folding"):
            gemma_fold.load(copied)

    def test_no_base_config(self, copied: Path) -> None:
        self.edit(copied / "config.json", base_config=None)
        with pytest.raises(CheckpointError, match="lost its base_config"):
            gemma_fold.load(copied)

    @pytest.mark.parametrize("how", ["raw w", "bf16 gamma", "absent"])
    def test_a_manifest_that_disagrees_with_the_tensors(self, copied: Path, how: str) -> None:
        tensors = load_file(copied / "model.safetensors")
        gamma = tensors.pop("model.norm.weight")
        if how == "raw w":
            tensors["model.norm.weight"] = (gamma[:, 0] - 1).bfloat16()
        elif how == "bf16 gamma":
            tensors["model.norm.weight"] = gamma.bfloat16()
        save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
        for loader in (gemma_fold.load, transformers.Gemma3ForCausalLM.from_pretrained):
            with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*fold the original"):
                loader(copied)

    def test_a_manifest_that_lists_too_little(self, copied: Path) -> None:
        self.edit(copied / "gemma_fold.json", drop=lambda m: m["tensors"].pop("model.norm.weight"))
        with pytest.raises(CheckpointError, match=r"13 zero-centred norms .* lists 12"):
            gemma_fold.load(copied)

    def test_a_config_put_back_does_not_unlock_it(self, source: Path, copied: Path) -> None:
        shutil.copy(source / "config.json", copied / "config.json")
        model = original(copied)  # the manifest still says what it is
        assert torch.equal(logits(model), logits(original(source)))

    def test_a_model_type_that_transformers_does_not_know(self, copied: Path) -> None:
        def change(config: dict[str, Any]) -> None:
            config["base_config"]["model_type"] = "gemma99"
            config["base_config"]["transformers_version"] = "6.1.0"

        self.edit(copied / "config.json", change=change)
        for loader in (gemma_fold.load, transformers.AutoModelForCausalLM.from_pretrained):
            with pytest.raises(gemma_fold.GemmaFoldError, match=r"gemma99.*transformers>=6\.1\.0"):
                loader(copied)

    def test_without_transformers_it_says_what_to_install(self, folded: Path) -> None:
        program = f"""
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, NotInstalled())
import gemma_fold
try:
    gemma_fold.load({str(folded)!r})
except gemma_fold.GemmaFoldError as error:
    print(error)
"""
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "pip install 'gemma-fold[transformers]'" in result.stdout, result.stderr

    def test_the_package_itself_is_light(self) -> None:
        program = (
            "import sys, gemma_fold; print({'torch', 'numpy', 'transformers'} & {*sys.modules})"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert result.stdout == "set()\n", result.stderr

    def test_messages_are_one_line(self, source: Path) -> None:
        with pytest.raises(CheckpointError) as caught:
            gemma_fold.load(source)
        assert "\n" not in str(caught.value)


def fp8_copy(source: Path, target: Path, block: int = 16) -> None:
    """A checkpoint as block-wise fp8 quantization writes it."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith("proj.weight"):
            out[name] = tensor
            continue
        rows, columns = (-(-extent // block) for extent in tensor.shape)
        padded = torch.zeros(rows * block, columns * block)
        padded[: tensor.shape[0], : tensor.shape[1]] = tensor.float()
        blocks = padded.unflatten(0, (rows, block)).unflatten(2, (columns, block))
        scale = blocks.abs().amax((1, 3)) / 448
        quantized = (blocks / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)
        out[name] = quantized[: tensor.shape[0], : tensor.shape[1]].to(torch.float8_e4m3fn)
        out[f"{name}_scale_inv"] = scale
    save_file(out, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        "modules_to_not_convert": ["lm_head"],
    }
    (target / "config.json").write_text(json.dumps(config))
