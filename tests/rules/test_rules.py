"""`classify` on whole checkpoints: what folds, what is left alone, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from checkpoint_shapes import GEMMA3, HYBRID, QK, STD4, hybrid, names_of, single, text_model
from hypothesis import given
from hypothesis import strategies as st

from gemma_fold.errors import (
    CheckpointError,
    UnsupportedModelError,
)
from gemma_fold.rules import Fold, Kind, Verdict, classify

# --- a whole checkpoint --------------------------------------------------------------------------


def test_gemma3_text_is_foldable() -> None:
    shapes = text_model()
    found = classify(GEMMA3, shapes)
    assert found.verdict is Verdict.FOLDABLE
    found.require_foldable()
    assert list(found.rules) == list(shapes)
    assert list(found.zero_centred()) == [n for n, shape in shapes.items() if len(shape) == 1]
    rule = found.rules["model.layers.1.self_attn.q_norm.weight"]
    assert (rule.pattern, rule.family) == (
        "model.layers.{i}.self_attn.q_norm.weight",
        "gemma3_text",
    )
    assert rule.fold == Fold("rms_norm", 1.0, "float32", "float32")
    assert rule.evidence is not None and rule.evidence.how == "executed"
    assert found.rules["model.embed_tokens.weight"].kind is Kind.OTHER


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.self_attn.k_norm.weight"])
def test_missing_norm_is_an_error(lost: str) -> None:
    shapes = text_model()
    del shapes[lost]
    found = classify(GEMMA3, shapes)
    assert found.missing == (lost,)
    with pytest.raises(CheckpointError, match=re.escape(lost)) as error:
        found.require_foldable()
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.0.extra_norm.weight",
        "model.layers.0.ln_1.weight",
        "model.ln_f.weight",
        "model.layers.0.LayerNorm.weight",
        "model.layers.0.something.gamma",
        "decoder.layers.0.input_layernorm.weight",
        "language_model.model.layers.0.input_layernorm.weight",
        "layers.0.input_layernorm.weight",  # a root that is fine, but not beside another
        "model.layers.2.input_layernorm.weight",  # the config knows two layers
        "model.layers.01.input_layernorm.weight",  # int() reads these two as 1, and no engine does
        "model.layers.\u0661.input_layernorm.weight",
        "xmodel.norm.weight",
        "model.norm.weight.extra",
    ],
)
def test_norm_that_no_rule_names_is_refused(extra: str) -> None:
    found = classify(GEMMA3, text_model() | {extra: (8,)})
    assert found.unclassified == (extra,)
    assert found.verdict is Verdict.UNSUPPORTED
    with pytest.raises(UnsupportedModelError, match=re.escape(extra)) as error:
        found.require_foldable()
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.bias", (8,)),
        ("model.norm.bias", (8,)),
        ("model.layers.0.normalizer_proj.weight", (8, 8)),
        ("model.layers.0.mlp.planner.weight", (8,)),
        ("model.layers.0.bn.norm.running_mean", (8,)),
    ],
)
def test_what_is_no_norm_weight_does_not_stand_in_the_way(name: str, shape: tuple[int]) -> None:
    found = classify(GEMMA3, text_model() | {name: shape})
    found.require_foldable()
    assert found.rules[name].kind is Kind.OTHER


def test_layers_are_counted_where_the_config_leaves_them_out() -> None:
    shapes = text_model(layers=3)
    del shapes["model.layers.1.input_layernorm.weight"]
    found = classify({"model_type": "gemma3_text"}, shapes)
    assert found.missing == ("model.layers.1.input_layernorm.weight",)
    assert any("num_hidden_layers" in note for note in found.notes)


@pytest.mark.parametrize("index", [10_000, 999_999_999])
def test_an_index_beyond_every_model_is_refused_at_once(index: int) -> None:
    name = f"model.layers.{index}.input_layernorm.weight"
    found = classify({"model_type": "gemma3_text"}, text_model() | {name: (8,)})
    assert found.verdict is Verdict.UNSUPPORTED
    assert f"layer {index}" in found.reason
    assert "num_hidden_layers" in found.reason
    assert not found.zero_centred()


def test_config_with_the_norms_of_another_model_is_refused() -> None:
    found = classify({"model_type": "recurrent_gemma", "num_hidden_layers": 2}, text_model())
    assert found.verdict is Verdict.UNSUPPORTED


@given(st.text("abdemlnorxy._", min_size=1, max_size=12))
def test_no_made_up_prefix_is_ever_folded(prefix: str) -> None:
    known = {"model.", "transformer."}
    if prefix in known:
        return
    found = classify(GEMMA3, {prefix + name: (8,) for name in text_model("") if "norm" in name})
    assert not found.zero_centred()


# --- layers of some types only -------------------------------------------------------------------


def test_qk_norms_are_called_for_in_full_attention_layers_only() -> None:
    classify(HYBRID, hybrid()).require_foldable()
    shapes = hybrid()
    del shapes["model.layers.1.self_attn.q_norm.weight"]
    assert classify(HYBRID, shapes).missing == ("model.layers.1.self_attn.q_norm.weight",)


def test_layer_types_follow_from_the_interval() -> None:
    config = {"model_type": "qwen3_next", "num_hidden_layers": 2, "full_attention_interval": 2}
    shapes = hybrid()
    classify(config, shapes).require_foldable()
    del shapes["model.layers.1.self_attn.k_norm.weight"]
    assert classify(config, shapes).missing == ("model.layers.1.self_attn.k_norm.weight",)


def test_trap_is_plain_and_says_why() -> None:
    rule = classify(HYBRID, hybrid()).rules["model.layers.0.linear_attn.norm.weight"]
    assert rule.kind is Kind.PLAIN
    assert rule.fold is None
    assert "gain itself" in rule.note


def test_draft_layers_past_the_last_only_where_the_family_has_them() -> None:
    step = {"model_type": "step3p5", "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    body = [f"model.layers.{{i}}.{n}" for n in [*STD4[:2], *QK]]
    shapes = names_of(*body, layers=3) | names_of(
        "model.norm.weight", "model.layers.2.enorm.weight"
    )
    found = classify(step, shapes)
    found.require_foldable()
    assert len(found.zero_centred()) == len(shapes)
    beyond = "model.layers.3.enorm.weight"
    assert classify(step, shapes | {beyond: (8,)}).unclassified == (beyond,)


def test_t5gemma_without_a_decoder() -> None:
    places = [f"{a}_{b}_layernorm" for a in ("pre", "post") for b in ("self_attn", "feedforward")]
    shapes = names_of(*(f"encoder.layers.{{i}}.{p}.weight" for p in places), "encoder.norm.weight")
    sub = {"num_hidden_layers": 2}
    config = {"model_type": "t5gemma", "encoder": sub, "decoder": sub, "is_encoder_decoder": False}
    classify(config, shapes).require_foldable()
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.0"):
        classify(config | {"is_encoder_decoder": True}, shapes).require_foldable()


# --- arithmetic other than RMSNorm with 1 + w in float32 -----------------------------------------


@pytest.mark.parametrize(
    ("config", "name", "fold"),
    [
        ({"model_type": "nemotron"}, "model.norm.weight", Fold("layer_norm", 1.0, "storage")),
        (
            {"model_type": "videoprism"},
            "text_model.layernorm.weight",
            Fold("layer_norm", 1.0, "storage"),
        ),
        (
            {"model_type": "moonshine_streaming"},
            "model.encoder.final_norm.gamma",
            Fold("layer_norm", 1.0, "storage", "storage"),
        ),
        (
            {"model_type": "muse_spark"},
            "model.language_model.layers.0.input_layernorm.weight",
            Fold("rms_norm", 1.0, "storage"),
        ),
        (
            {"model_type": "qwen4_exp_text"},
            "model.layers.0.attn_hyper_connection.hc_norm.weight",
            Fold("grouped_rms_norm"),
        ),
        ({"model_type": "qwen4_exp_text"}, "model.layers.3.self_attn.q_norm.weight", Fold()),
        (
            {"model_type": "xllm", "num_values": 4},
            "model.norm.weight",
            Fold("grouped_rms_norm", 1.0, "storage"),
        ),
        (
            {"model_type": "plamo2"},
            "model.layers.layers.0.post_mlp_norm.weight",
            Fold("rms_norm", 1 / 5**1.5, "storage", "storage"),
        ),
    ],
)
def test_arithmetic(config: dict[str, Any], name: str, fold: Fold) -> None:
    assert single(config, name)[1].rules[name].fold == fold


def test_bias_of_a_layer_norm_is_left_alone() -> None:
    shapes = names_of(*(f"model.layers.{{i}}.{n}" for n in STD4[:2]), "model.norm.weight")
    biases = {name.replace("weight", "bias"): (8,) for name in shapes}
    found = classify({"model_type": "nemotron", "num_hidden_layers": 2}, shapes | biases)
    found.require_foldable()
    assert set(found.zero_centred()) == set(shapes)
    assert {found.rules[name].kind for name in biases} == {Kind.OTHER}


def test_input_scaled_norms_are_reported_and_never_folded() -> None:
    places = ["input_layernorm", "pre_feedforward_layernorm", "mlp.pre_expert_norm"]
    scaled = ["post_feedforward_layernorm", "mlp.experts.post_expert_norm"]
    shapes = names_of(*(f"layers.{{i}}.{p}.weight" for p in [*places, *scaled]), "norm.weight")
    found = classify({"model_type": "muse_spark_text", "num_hidden_layers": 2}, shapes)
    found.require_foldable()
    kinds = {name: rule.kind for name, rule in found.rules.items()}
    assert kinds["norm.weight"] is Kind.PLAIN
    left = {name for name, kind in kinds.items() if kind is Kind.NOT_A_GAMMA}
    assert left == set(names_of(*(f"layers.{{i}}.{p}.weight" for p in scaled)))
    assert not left & set(found.zero_centred())
    assert all(found.rules[name].fold is None for name in left)
    assert any("not the gain" in note for note in found.notes)
