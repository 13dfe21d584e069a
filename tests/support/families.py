"""Tiny models of the 34 surveyed families, with layers of every kind, and what to run them on.

Adds to `tiny` the model types that stand alone inside its wrappers, and inputs with pictures and
sound, so that vision and audio towers take part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

#: model type -> names measured in transformers; see the file's own `_about`.
NAMES: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "norms.json").read_text())
NORM_CLASSES: dict[str, Any] = NAMES.pop("_about")["classes"]
SURVEYED = [model_type for model_type, names in NAMES.items() if names["zero_centred"]]


@dataclass(frozen=True)
class Family:
    """How to build a family small: its class, and what to change in its default config."""

    cls: str
    config: dict[str, Any]


def _changed(name: str, **changes: Any) -> dict[str, Any]:
    config = dict(tiny.CONFIGS[name])
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    return config


# One of its layers has the sparse indexer, which has norms of its own.
_MINIMAX = _changed(
    "minimax_m3_vl", text_config={"layer_types": ["full_attention", "minimax_m3_sparse"]}
)
# Four patches of 16 columns reach the projector as one.
_GLIMMER = _changed("muse_glimmer", out_hidden_size=64)
_SPARK = _changed("muse_spark", out_hidden_size=64)
FAMILIES = {name: Family(tiny.CLASSES[name], config) for name, config in tiny.CONFIGS.items()} | {
    "minicpm_ocr": Family(
        # its other mode leaves out a merger that has norms
        "MiniCPMOcrForConditionalGeneration",
        _changed("minicpm_ocr", downsample_mode="16x"),
    ),
    "minimax_m3_vl": Family("MiniMaxM3SparseForConditionalGeneration", _MINIMAX),
    "minimax_m3_vl_text": Family("MiniMaxM3VLForCausalLM", _MINIMAX["text_config"]),
    "muse_glimmer": Family("MuseGlimmerForConditionalGeneration", _GLIMMER),
    "muse_glimmer_text": Family("MuseGlimmerTextModel", _GLIMMER["text_config"]),
    "muse_spark": Family("MuseSparkForConditionalGeneration", _SPARK),
    "muse_spark_text": Family("MuseSparkTextModel", _SPARK["text_config"]),
    "qwen4_exp_text": Family("Qwen4ExpForCausalLM", tiny.CONFIGS["qwen4_exp"]["text_config"]),
    "videoprism_vision_model": Family(
        "VideoPrismVideoModel", tiny.CONFIGS["videoprism"]["vision_config"]
    ),
}


def model_class(family: str) -> Any:
    return getattr(transformers, FAMILIES[family].cls)


#: Halves of a model, which the whole builds from a part of its config; never saved alone.
HALVES = ("MoonshineStreamingDecoder", "T5GemmaEncoder", "T5GemmaDecoder")


@lru_cache
def model_classes(family: str) -> tuple[type[Any], ...]:
    """Every class of transformers that is built from this family's config."""
    config_class = CONFIG_MAPPING[family]
    module = import_module(config_class.__module__.replace("configuration_", "modeling_"))
    classes = (c for c in vars(module).values() if isinstance(c, type))
    return tuple(
        c
        for c in classes
        if issubclass(c, transformers.PreTrainedModel)
        and getattr(c, "config_class", None) is config_class
        and not c.__name__.endswith("PreTrainedModel")
        and c.__name__ not in HALVES
    )


def build(family: str, dtype: torch.dtype, cls: Any = None) -> Any:
    """A model with random weights; the gains are random too, and never zero."""
    torch.manual_seed(0)
    encoder_only = {"is_encoder_decoder": False} if "EncoderModel" in str(cls) else {}
    config = CONFIG_MAPPING[family](**FAMILIES[family].config | encoder_only)
    return tiny.fill((cls or model_class(family))(config), dtype)


def gains(model: nn.Module) -> Iterator[Tensor]:
    """The parameters of the modules whose class was measured to be zero-centred."""
    for module in model.modules():
        fact = NORM_CLASSES.get(type(module).__name__)
        if fact is not None and fact["verdict"] == "zero_centred":
            yield getattr(module, fact["param"])


def inputs(family: str, dtype: torch.dtype) -> dict[str, Any]:
    """What to call a model of this family with."""
    generator = torch.Generator().manual_seed(1)

    def ids(*lead: int, tokens: int = 7) -> Tensor:
        text = torch.randint(3, 88, (tokens,), generator=generator)
        return torch.cat([torch.tensor(lead, dtype=torch.long), text])[None]

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    patches = {"pixel_values": noise(16, 24), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if family in ("qwen3_5", "qwen3_5_moe", "qwen4_exp"):
        text = ids(92, *[90] * 4, 93, tokens=32)  # enough for an indexer to have to choose
        return {"input_ids": text, "mm_token_type_ids": (text == 90).int(), **patches}
    if family == "minimax_m3_vl":
        return {"input_ids": ids(*[90] * 4, tokens=36), **patches}
    if family in ("minimax_m3_vl_text", "qwen4_exp_text"):
        return {"input_ids": ids(tokens=40)}
    if family == "muse_glimmer":
        return {"input_ids": ids(*[90] * 4), **patches}
    if family == "muse_spark":
        text = ids(*[90] * 4, 94, 94)
        return {"input_ids": text, "input_values": noise(1, 2 * 1920), **patches}
    if family == "step3p7":
        return {"input_ids": ids(90), "pixel_values": noise(1, 3, 8, 8)}
    if family.startswith("minicpm"):
        text = ids(90)
        return {
            "input_ids": text,
            "pixel_values": noise(1, 3, 8, 8),
            "target_sizes": torch.tensor([[4, 4]]),
            "mm_token_type_ids": (text == 90).int(),
        }
    if family == "videoprism_vision_model":
        return {"pixel_values_videos": noise(1, 2, 3, 8, 8)}
    return tiny.inputs(family, dtype)
