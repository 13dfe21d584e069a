"""`gemma-fold doctor`: what is here, and what would be fused, without weights or imports."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from commands import run_here

from gemma_fold.commands.convert import convert
from gemma_fold.engines import checks, doctor
from gemma_fold.errors import (
    CheckpointError,
    HostError,
    NothingToFoldError,
    UnsupportedModelError,
    UsageError,
)

#: A model in the protocol of vLLM and SGLang, written for these tests.
ENGINE_SOURCE = """
import a_gpu_library_that_is_not_here


class {begin}Attention:
    def forward(self, positions, hidden_states, **kwargs):
        q, k, v = self.qkv_proj(hidden_states)[0].split(3)
        if self.is_sliding:
            q = self.rotary(q)
        mixed = self.attn(q, k, v)
        out, _ = self.o_proj(mixed)
        return out


class {begin}MLP:
    def forward(self, x):
        gates, _ = self.gate_up_proj(x)
        x, _ = self.down_proj(self.act(gates))
        return x


class {begin}DecoderLayer:
    def forward(self, positions, hidden_states, residual=None, **kwargs):
        if residual is None:
            residual = hidden_states
            x = self.input_layernorm(hidden_states)
        else:
            x, residual = self.input_layernorm(hidden_states, residual)
        x = self.self_attn(positions=positions, hidden_states=x, **kwargs)
        x = self.post_attention_layernorm(x)
        {between}
        x, residual = self.pre_feedforward_layernorm(x, residual)
        x = self.mlp(x)
        return self.post_feedforward_layernorm(x), residual


class {begin}{model}:
    def forward(self, input_ids, positions, **kwargs):
        x, residual = self.embed(input_ids), None
        for layer in self.layers:
            x, residual = layer(positions, x, residual, **kwargs)
        x, _ = self.norm(x, residual)
        return x
"""
PLACES = {
    "vllm": ("vllm/model_executor/models/gemma3.py", "Model", "0.33.0"),
    "sglang": ("sglang/srt/models/gemma3_causal.py", "TextModel", "0.5.24"),
}


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Engines that can be read and not imported; `between` goes into their layers."""

    def install(between: str = "pass") -> None:
        for name, (path, model, version) in PLACES.items():
            file = tmp_path / "site" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(ENGINE_SOURCE.format(begin="Gemma3", model=model, between=between))
            (tmp_path / "site" / name / "__init__.py").write_text("raise RuntimeError('imported')")
            info = tmp_path / "site" / f"{name}-{version}.dist-info"
            info.mkdir(exist_ok=True)
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    return install


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("gemma3_text", tmp_path_factory.mktemp("gemma3") / "source", torch.bfloat16)


def reports(found: doctor.Diagnosis) -> dict[str, Any]:
    return {one.engine: one.report for one in found.outlooks}


def test_without_a_model() -> None:
    found = doctor.diagnose()
    assert found.torch == torch.__version__ and found.model is None and found.outlooks == ()
    engine = found.engines[0]
    assert (engine.name, engine.version) == ("transformers", transformers.__version__)
    assert engine.as_tested and engine.plugin is None
    assert f"transformers {transformers.__version__}: checked with" in doctor.text(found)
    assert bool(found.gpus) == torch.cuda.is_available()


def test_an_original_and_its_folded_form(gemma3: Path, tmp_path: Path) -> None:
    convert(gemma3, tmp_path / "folded")
    for folder in (gemma3, tmp_path / "folded"):
        for weights in folder.glob("*.safetensors"):
            weights.rename(weights.with_suffix(".away"))  # they are not read
        try:
            report = reports(doctor.diagnose(folder))["transformers"]
        finally:
            for weights in folder.glob("*.away"):
                weights.rename(weights.with_suffix(".safetensors"))
        assert (report.norms, report.fused, report.sandwiches) == (13, 4, 4)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "t5gemma", "qwen3_next"])
def test_it_says_what_folding_does(family: str, tmp_path: Path) -> None:
    import gemma_fold
    from gemma_fold.engines.transformers import layers
    from gemma_fold.engines.transformers.norms import FoldedNorm

    model = tiny.build(family)
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = reports(doctor.diagnose(tmp_path))["transformers"]
    gemma_fold.fold_model(model)
    modules = list(model.modules())
    assert report.norms == sum(isinstance(m, FoldedNorm) for m in modules)
    shapes = [m.shape for m in modules if isinstance(m, layers.SandwichLayer)]
    assert report.fused == report.sandwiches == sum(shape.sandwiches for shape in shapes)


def test_engines_are_read_and_not_imported(gemma3: Path, engines: Any) -> None:
    engines()
    found = doctor.diagnose(gemma3)
    assert not {"vllm", "sglang"} & set(sys.modules)
    for name in PLACES:
        report = reports(found)[name]
        assert (report.fused, report.sandwiches) == (4, 4)
    by_name = {engine.name: engine for engine in found.engines}
    assert by_name["vllm"].as_tested and not by_name["sglang"].as_tested
    assert "sglang 0.5.24: checked with 0.5.17 to 0.5.23, not with this one" in doctor.text(found)


def test_a_layer_that_reads_what_is_handed_on(gemma3: Path, engines: Any) -> None:
    engines("x = x * 2")
    found = doctor.diagnose(gemma3)
    assert not found.ok
    for name in PLACES:
        report = reports(found)[name]
        assert (report.fused, report.sandwiches) == (0, 4)
        assert "the output of post_attention_layernorm goes into mul" in str(report)
    assert reports(found)["transformers"].complete


def test_a_plugin_that_is_left_out(
    gemma3: Path, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines()
    assert doctor.diagnose().engines[1].plugin
    monkeypatch.setenv("VLLM_PLUGINS", "another, one")
    found = doctor.diagnose()
    assert found.engines[1].plugin is False and not found.ok
    assert "does not find gemma-fold: install it beside, and see VLLM_PLUGINS" in doctor.text(found)
    monkeypatch.setenv("VLLM_PLUGINS", "another, gemma_fold")
    assert doctor.diagnose().engines[1].plugin is False  # vLLM takes the names as they are
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert doctor.diagnose().engines[1].plugin is False  # nothing is allowed
    monkeypatch.setenv("VLLM_PLUGINS", "another,gemma_fold")
    assert doctor.diagnose().engines[1].plugin
    monkeypatch.setenv("SGLANG_PLUGINS", "another, gemma_fold")
    assert doctor.diagnose().engines[2].plugin


def test_what_cannot_be_diagnosed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        doctor.diagnose(tmp_path / "absent" / "folder" / "deep")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        doctor.diagnose(tmp_path)
    config = tmp_path / "config.json"
    for content in ("{", "[]"):
        config.write_text(content)
        with pytest.raises(CheckpointError, match="JSON"):
            doctor.diagnose(tmp_path)
    config.write_text('{"model_type": "of_the_future"}')
    with pytest.raises(UnsupportedModelError, match="of_the_future"):
        doctor.diagnose(tmp_path)
    transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    ).save_pretrained(tmp_path)
    with pytest.raises(NothingToFoldError, match="llama"):
        doctor.diagnose(tmp_path)
    monkeypatch.setenv("GEMMA_FOLD", "requird")
    with pytest.raises(UsageError, match="requird"):
        doctor.diagnose()


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HostError, match="cannot fetch"):
        doctor.diagnose("someone/something-that-is-not-cached")


def test_the_command(gemma3: Path, tmp_path: Path) -> None:
    found = run_here("doctor", gemma3, "--json")
    assert found.returncode == 0, found.stderr
    plain = json.loads(found.stdout)
    assert plain["ok"] and plain["outlooks"][0]["report"]["fused"] == 4
    assert "4 of 4 sandwiches fused (built without weights)" in run_here("doctor", gemma3).stdout
    transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    ).save_pretrained(tmp_path)
    refused = run_here("doctor", tmp_path)
    assert refused.returncode == 3 and refused.stderr.count("\n") == 1
    assert run_here("doctor", tmp_path / "absent").returncode == 2


def test_versions_are_compared_as_numbers() -> None:
    engine = doctor.Engine("vllm", "0.33.1+cpu", ("0.26", "0.33"))
    assert engine.as_tested
    assert not doctor.Engine("vllm", "0.4.2", ("0.26", "0.33")).as_tested
    assert checks.numbers("0.5.23.post1") == (0, 5, 23)
