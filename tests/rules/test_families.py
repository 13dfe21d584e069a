"""Fold every zero-centred family, run it as plain-gamma models run, and compare every bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
import transformers
from families import FAMILIES, SURVEYED, build, gains, model_class, model_classes
from plain_gamma import difference, load_plain, outputs, plain_semantics, read, unlock, write
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gemma_fold.commands.convert import convert
from gemma_fold.errors import NothingToFoldError
from gemma_fold.rules import Classification, Kind, Verdict, classify

pytestmark = pytest.mark.slow

PARAMETRIZE = pytest.mark.parametrize("family", SURVEYED)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def test_every_family_of_the_survey_is_here() -> None:
    assert sorted(FAMILIES) == sorted(SURVEYED)
    assert len(SURVEYED) == 34


@PARAMETRIZE
@DTYPES
def test_folded_logits_equal_the_original(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tmp_path / "source"
    build(family, dtype).save_pretrained(source)
    original = model_class(family).from_pretrained(source, dtype=dtype)
    inputs = families.inputs(family, dtype)
    expected = outputs(original, inputs)

    convert(source, tmp_path / "folded")
    tensors = unlock(tmp_path / "folded", source)
    plain = load_plain(write(tmp_path / "plain", tensors, source), original)
    with plain_semantics():
        assert difference(outputs(plain, inputs), expected) == 0.0

    raw = load_plain(source, original)
    with plain_semantics():
        assert difference(outputs(raw, inputs), expected) > 0, "folding nothing changes nothing"


#: Norm weights that no output of the tiny model depends on, so that a mistake there cannot show.
_POOLING = "vision_tower.head.layernorm.weight"  # of SigLIP's pooling head, which Gemma ignores
UNSEEN = {
    "gemma3": _POOLING,
    "shieldgemma2": "model.model." + _POOLING,
    "t5gemma2": "model.encoder." + _POOLING,
    # the action expert reads the keys and values of the layers, not what comes after them
    "pi0": "paligemma_with_expert.paligemma.model.language_model.model.norm.weight",
}


@PARAMETRIZE
def test_each_gain_and_each_trap_matters(family: str, tmp_path: Path) -> None:
    """One norm left out, or one trap folded too many, and the outputs change."""
    source = tmp_path / "source"
    build(family, torch.float32).save_pretrained(source)
    model = model_class(family).from_pretrained(source).eval()
    found = classify_folder(source)
    inputs = families.inputs(family, torch.float32)
    expected = outputs(model, inputs)
    by_value = {tuple(p.tolist()): p for p in model.parameters() if p.dim() == 1}
    stored = read(source)
    first = {rule.pattern: name for name, rule in reversed(found.rules.items())}
    unseen = []
    for pattern, name in first.items():
        if found.rules[name].kind not in (Kind.ZERO_CENTRED, Kind.PLAIN):
            continue
        parameter = by_value[tuple(stored[name].tolist())]
        for step in (1.0, -1.0):  # folded once too often, and back
            with torch.no_grad():
                before = parameter.clone()
                parameter += step
                changed = difference(outputs(model, inputs), expected) > 0
                parameter.copy_(before)
            if not changed:
                unseen.append(pattern)
    assert set(unseen) == ({UNSEEN[family]} if family in UNSEEN else set())


def classify_folder(folder: Path) -> Classification:
    config = json.loads((folder / "config.json").read_text())
    return classify(config, {name: tuple(tensor.shape) for name, tensor in read(folder).items()})


@PARAMETRIZE
def test_every_class_of_the_family_classifies(family: str, tmp_path: Path) -> None:
    """By name in the checkpoint, the rules find the parameters that the classes say are theirs."""
    for cls in model_classes(family):
        model = build(family, torch.float32, cls)
        folder = tmp_path / cls.__name__
        model.save_pretrained(folder)
        found = classify_folder(folder)
        assert found.verdict is Verdict.FOLDABLE, (cls, found.reason)
        found.require_foldable()
        stored = read(folder)
        assert sorted(stored[name].tolist() for name in found.zero_centred()) == sorted(
            gain.tolist() for gain in gains(model)
        ), cls


# --- plain families, and wrappers around any model -----------------------------------------------

_TEXT = tiny.CONFIGS["gemma3_text"] | {"model_type": "gemma3_text"}
_SMALL = {key: _TEXT[key] for key in ("vocab_size", "hidden_size", "intermediate_size")} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
PLAIN = {
    "llama": ("LlamaForCausalLM", _SMALL),
    "qwen3": ("Qwen3ForCausalLM", _SMALL),
    "mistral": ("MistralForCausalLM", _SMALL),
    "gemma3n_text": (
        "Gemma3nForCausalLM",
        _SMALL
        | {
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma4_text": (
        "Gemma4ForCausalLM",
        _SMALL
        | {
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


@pytest.mark.parametrize("family", PLAIN)
def test_plain_family_has_nothing_to_fold(family: str, tmp_path: Path) -> None:
    cls, config = PLAIN[family]
    getattr(transformers, cls)(CONFIG_MAPPING[family](**config)).save_pretrained(
        tmp_path / "source"
    )
    with pytest.raises(NothingToFoldError) as error:
        convert(tmp_path / "source", tmp_path / "folded")
    assert error.value.exit_code == 3
    assert not (tmp_path / "folded").exists()


_AUDIO = {"num_mel_bins": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("LlavaFor", {"vision_config": tiny.VISION | {"model_type": "clip_vision_model"}}),
    "llava_onevision": (
        "LlavaOnevisionFor",
        {"vision_config": tiny.VISION | {"model_type": "siglip_vision_model"}},
    ),
    "mistral3": ("Mistral3For", {"vision_config": tiny.VISION | {"model_type": "pixtral"}}),
    "internvl": (
        "InternVLFor",
        {
            "vision_config": tiny.VISION
            | {"model_type": "internvl_vision", "image_size": [8, 8], "patch_size": [2, 2]}
        },
    ),
    "idefics3": ("Idefics3For", {"vision_config": tiny.VISION}),
    "aya_vision": (
        "AyaVisionFor",
        {"vision_config": tiny.VISION | {"model_type": "siglip_vision_model"}},
    ),
    "voxtral": ("VoxtralFor", {"audio_config": _AUDIO | {"intermediate_size": 24}}),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapper_around_a_gemma(wrapper: str, tmp_path: Path) -> None:
    prefix, parts = WRAPPERS[wrapper]
    config = CONFIG_MAPPING[wrapper](text_config=_TEXT, **parts)
    model = tiny.fill(
        getattr(transformers, f"{prefix}ConditionalGeneration")(config), torch.float32
    )
    model.save_pretrained(tmp_path)
    found = classify_folder(tmp_path)
    found.require_foldable()
    stored = read(tmp_path)
    assert sorted(stored[name].tolist() for name in found.zero_centred()) == sorted(
        gain.tolist() for gain in gains(model)
    )
