"""`classify` by model: config switches, models inside wrappers, and models that are refused."""

from __future__ import annotations

from typing import Any

import pytest
from checkpoint_shapes import GEMMA3, HYBRID, STD4, names_of, single, text_model

from gemma_fold.errors import (
    AlreadyFoldedError,
    UnsupportedModelError,
)
from gemma_fold.rules import Kind, Verdict, classify

# --- switches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "minimax_m3_vl_text", "use_gemma_norm": True}, Kind.ZERO_CENTRED),
        ({"model_type": "minimax_m3_vl_text"}, Kind.ZERO_CENTRED),
        ({"model_type": "minimax_m3_vl_text", "use_gemma_norm": False}, Kind.PLAIN),
        ({"model_type": "gigachat3_5"}, Kind.ZERO_CENTRED),
        ({"model_type": "gigachat3_5", "norm_type": "ZeroCenteredRMSNorm"}, Kind.ZERO_CENTRED),
        ({"model_type": "gigachat3_5", "norm_type": "LlamaRMSNorm"}, Kind.PLAIN),
        ({"model_type": "gigachat3_5", "norm_type": "GatedNorm"}, Kind.PLAIN),
        ({"model_type": "xllm", "num_values": 8}, Kind.ZERO_CENTRED),
        ({"model_type": "xllm", "num_values": 0}, Kind.PLAIN),
        ({"model_type": "xllm"}, Kind.PLAIN),
        ({"model_type": "k2_horizon", "num_values": 8}, Kind.PLAIN),
        ({"architectures": ["DFlashDraftModel"], "use_gemma_norm": True}, Kind.ZERO_CENTRED),
        ({"architectures": ["DFlashDraftModel"], "model_type": "qwen3"}, Kind.PLAIN),
        ({"model_type": "step5", "zero_centered": True}, Kind.ZERO_CENTRED),
        ({"model_type": "step5"}, Kind.ZERO_CENTRED),
        ({"model_type": "step5", "zero_centered": False}, Kind.PLAIN),
    ],
)
def test_switch(config: dict[str, Any], kind: Kind) -> None:
    name = "model.layers.0.input_layernorm.weight"
    got, found = single(config, name)
    assert got is kind
    if kind is Kind.PLAIN:
        assert found.verdict is Verdict.NOTHING_TO_FOLD
        assert "stores plain gamma (" in found.reason


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gigachat3_5", "norm_type": "SomethingNew"},
        {"model_type": "minimax_m3_vl_text", "use_gemma_norm": "yes"},
        {"model_type": "gigachat3_5", "linear_gating_type": 3},
    ],
)
def test_unknown_switch_value_is_refused(config: dict[str, Any]) -> None:
    found = single(config, "model.layers.0.input_layernorm.weight")[1]
    assert found.verdict is Verdict.UNSUPPORTED
    assert "unknown" in found.reason


DSPARK = {"model_type": "muse_spark_dspark", "norm_zero_centered_gamma": True}
DSPARK_NORMS = names_of(
    *(
        f"layers.{{i}}.{name}.weight"
        for name in ("self_attn.pre_qkv_proj_norm", "pre_ffn_norm", "post_attn_norm")
    ),
    "layers.{i}.post_ffn_norm.weight",
    "hidden_norm.weight",
    "norm.weight",
)


def test_draft_of_muse_spark_folds_where_its_offsets_are_one_number() -> None:
    found = classify(DSPARK | {"num_hidden_layers": 2}, DSPARK_NORMS)
    found.require_foldable()
    assert set(found.zero_centred()) == set(DSPARK_NORMS)
    plain = classify(DSPARK | {"norm_zero_centered_gamma": False}, DSPARK_NORMS)
    assert plain.verdict is Verdict.NOTHING_TO_FOLD


@pytest.mark.parametrize("center", ["one", "inverse_residual_index"])
def test_draft_of_muse_spark_without_weights_on_its_post_norms(center: str) -> None:
    config = DSPARK | {"num_hidden_layers": 2, "post_norm_affine": False}
    config |= {"post_norm_gain_center_type": center}
    shapes = {name: shape for name, shape in DSPARK_NORMS.items() if "post" not in name}
    classify(config, shapes).require_foldable()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"post_norm_gain_center_type": "inverse_residual_index"}, "index of each layer"),
        ({"post_norm_gain_center_type": "inverse_residual_index_v2"}, "index of each layer"),
        ({"post_norm_gain_center_type": "inverse_sqrt_residual_index"}, "index of each layer"),
        ({"post_norm_gain_center_type": "inverse_sqrt_layers"}, "index of each layer"),
        ({"use_ffn_learnable_scales": True}, "scales the input of its norm"),
    ],
)
def test_draft_of_muse_spark_is_refused_where_they_are_not(
    change: dict[str, Any], reason: str
) -> None:
    found = classify(DSPARK | change, DSPARK_NORMS)
    assert found.verdict is Verdict.UNSUPPORTED
    assert reason in found.reason
    assert not found.zero_centred()


def test_draft_layers_that_no_engine_loads_stay_as_they_are() -> None:
    config = {"model_type": "alice_ai", "num_hidden_layers": 2, "layer_types": ["x"] * 2}
    draft = "mtp.layers.0.input_layernorm.weight"
    body = names_of(*(f"model.layers.{{i}}.{n}" for n in STD4[:2]), "model.norm.weight")
    found = classify(config, body | {draft: (8,)})
    found.require_foldable()
    assert set(found.zero_centred()) == set(body)
    assert found.rules[draft].kind is Kind.OTHER


def test_linear_attention_norm_of_gigachat_has_its_own_switch() -> None:
    name = "model.layers.0.linear_attn.norm.weight"
    config = {"model_type": "gigachat3_5"}
    assert single(config, name)[0] is Kind.PLAIN
    gated = config | {"linear_gating_type": "zero_centered_sigmoid"}
    assert single(gated, name)[0] is Kind.ZERO_CENTRED


# --- wrappers ------------------------------------------------------------------------------------

LLAVA = {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}


def wrapped(text: str) -> dict[str, Any]:
    return LLAVA | {"text_config": {"model_type": text, "num_hidden_layers": 2}}


def test_wrapper_is_decided_by_the_model_inside() -> None:
    shapes = text_model("language_model.model.") | names_of(
        "vision_tower.vision_model.encoder.layers.{i}.layer_norm1.weight",
        "vision_tower.vision_model.post_layernorm.weight",
        "multi_modal_projector.norm.weight",
    )
    found = classify(wrapped("gemma3_text"), shapes)
    found.require_foldable()
    assert set(found.zero_centred()) == {
        n for n, s in text_model("language_model.model.").items() if len(s) == 1
    }
    vision = found.rules["vision_tower.vision_model.post_layernorm.weight"]
    assert (vision.kind, vision.family) == (Kind.PLAIN, "clip_vision_model")
    assert found.rules["multi_modal_projector.norm.weight"].kind is Kind.PLAIN
    assert classify(wrapped("llama"), shapes).verdict is Verdict.NOTHING_TO_FOLD


def test_norm_inside_a_wrapped_model_still_needs_a_rule() -> None:
    extra = "language_model.model.layers.0.extra_norm.weight"
    found = classify(wrapped("gemma3_text"), text_model("language_model.model.") | {extra: (8,)})
    assert found.unclassified == (extra,)


def test_unknown_model_inside_a_wrapper_is_refused() -> None:
    found = classify(wrapped("brand_new"), text_model("language_model.model."))
    assert found.verdict is Verdict.UNSUPPORTED
    assert "text_config of llava" in found.reason and "brand_new" in found.reason


@pytest.mark.parametrize(("text", "folded"), [("gemma", 4), ("gemma2", 8), ("llama", 0)])
def test_paligemma_follows_its_text_config(text: str, folded: int) -> None:
    config = {"model_type": "paligemma", "text_config": {"model_type": text}}
    shapes = names_of(*(f"language_model.model.layers.{{i}}.{n}" for n in STD4))
    assert len(classify(config, shapes).zero_centred()) == folded


def test_encoder_decoder_folds_the_half_that_is_zero_centred() -> None:
    config = {
        "model_type": "encoder-decoder",
        "encoder": {"model_type": "bert"},
        "decoder": {"model_type": "gemma3_text", "num_hidden_layers": 2},
    }
    shapes = text_model("decoder.model.") | names_of("encoder.embeddings.LayerNorm.weight")
    found = classify(config, shapes)
    found.require_foldable()
    assert found.rules["encoder.embeddings.LayerNorm.weight"].family == "bert"
    assert len(found.zero_centred()) == 13


def test_minimax_ignores_the_model_type_of_its_text_config() -> None:
    # its published config says minimax_m2 there, which is a family with plain norms
    config = {"model_type": "minimax_m3_vl", "text_config": {"model_type": "minimax_m2"}}
    assert single(config, "language_model.model.norm.weight")[0] is Kind.ZERO_CENTRED


def test_both_halves_of_pi0() -> None:
    text = [f"layers.{{i}}.{n}" for n in STD4[:2]] + ["norm.weight"]
    halves = ("paligemma.model.language_model.", "gemma_expert.model.")
    shapes = names_of(*(f"paligemma_with_expert.{half}{n}" for half in halves for n in text))
    sub = {"model_type": "gemma", "num_hidden_layers": 2}
    config = {
        "model_type": "pi0",
        "vlm_config": {"model_type": "paligemma", "text_config": sub},
        "dit_config": sub,
    }
    found = classify(config, shapes)
    found.require_foldable()
    assert len(found.zero_centred()) == len(shapes) == 10


# --- not to be folded at all ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{"model_type": "gemma_fold"}, GEMMA3 | {"gemma_fold": {"format": 1}}]
)
def test_folded_checkpoint_is_never_folded_again(config: dict[str, Any]) -> None:
    found = classify(config, text_model())
    assert found.verdict is Verdict.ALREADY_FOLDED
    assert not found.zero_centred()
    with pytest.raises(AlreadyFoldedError):
        found.require_foldable()


@pytest.mark.parametrize(
    ("config", "name", "shape"),
    [
        (HYBRID, "model.layers.0.linear_attn.conv1d.weight", (24, 4, 1)),
        (
            {"model_type": "qwen3_5", "text_config": HYBRID | {"model_type": "qwen3_5_text"}},
            "language_model.model.layers.0.linear_attn.conv1d.weight",
            (24, 4, 1),
        ),
        ({"model_type": "step3p5"}, "model.layers.3.mlp.switch_mlp.up_proj.weight", (4, 8, 8)),
        ({"model_type": "muse_spark"}, "model.language_model.layers.0.add_attn_alpha", (8,)),
    ],
)
def test_mlx_conversion_has_folded_already(
    config: dict[str, Any], name: str, shape: tuple[int, ...]
) -> None:
    prefix = name[: name.index("layers.")]
    found = classify(config, names_of(prefix + "layers.{i}.input_layernorm.weight") | {name: shape})
    assert found.verdict is Verdict.ALREADY_FOLDED
    assert "MLX" in found.reason


@pytest.mark.parametrize("config", [{}, {"model_type": "brand_new"}, {"model_type": None}])
def test_unknown_model_type_is_refused(config: dict[str, Any]) -> None:
    found = classify(config, text_model())
    assert found.verdict is Verdict.UNSUPPORTED
    with pytest.raises(UnsupportedModelError, match="model_type"):
        found.require_foldable()


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "Krea2Transformer2DModel"},
        {"type": "pi05"},
        {"model_type": "pi05"},
        {"model_type": "musespark1x_text"},
        {"model_type": "t5gemma2_encoder"},
    ],
)
def test_refused_model_says_why(config: dict[str, Any]) -> None:
    found = classify(config, names_of("norm.weight"))
    assert found.verdict is Verdict.UNSUPPORTED
    assert "cannot be folded" in found.reason


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gemma3n", "gemma4", "mellum"])
def test_plain_families(model_type: str) -> None:
    found = classify({"model_type": model_type, "num_hidden_layers": 2}, text_model())
    assert found.verdict is Verdict.NOTHING_TO_FOLD
    assert {rule.kind for rule in found.rules.values()} == {Kind.PLAIN, Kind.OTHER}


def test_checkpoint_without_any_norm_is_refused() -> None:
    found = classify({"model_type": "minimax_m3_mtp"}, {"model.embed_tokens.weight": (8, 8)})
    assert found.verdict is Verdict.UNSUPPORTED


# --- configs that make no sense ------------------------------------------------------------------


@pytest.mark.parametrize("layers", [-1, 10**12, 2.5, "2", [2]])
def test_layer_count_that_is_none(layers: object) -> None:
    found = classify({"model_type": "gemma3_text", "num_hidden_layers": layers}, text_model())
    assert found.verdict is Verdict.UNSUPPORTED
    assert "not a number of layers" in found.reason


@pytest.mark.parametrize(
    "config",
    [
        GEMMA3 | {"architectures": None},
        GEMMA3 | {"architectures": "Gemma3ForCausalLM"},
        GEMMA3 | {"architectures": [{}]},
        GEMMA3 | {"layer_types": "all"},
        GEMMA3 | {"text_config": None},
    ],
)
def test_odd_values_that_do_not_matter(config: dict[str, Any]) -> None:
    classify(config, text_model()).require_foldable()


def test_index_of_a_thousand_digits_is_no_layer() -> None:
    name = f"model.layers.{'9' * 5000}.input_layernorm.weight"
    assert classify(GEMMA3, text_model() | {name: (8,)}).unclassified == (name,)


def test_endless_nesting_is_refused() -> None:
    config: dict[str, Any] = {"model_type": "gemma"}
    for _ in range(30):
        config = {"model_type": "llava", "text_config": config}
    assert "too often" in classify(config, text_model()).reason
