"""Shapes of made-up checkpoints, as `classify` takes them."""

from __future__ import annotations

from typing import Any

from gemma_fold.rules import Classification, Kind, classify

STD4 = [
    f"{place}_layernorm.weight"
    for place in ("input", "post_attention", "pre_feedforward", "post_feedforward")
]
QK = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]


def names_of(*patterns: str, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Shapes of one-dimensional tensors, `{i}` standing for each of the layers."""
    return {
        pattern.replace("{i}", str(i)): (8,)
        for pattern in patterns
        for i in range(layers if "{i}" in pattern else 1)
    }


def text_model(root: str = "model.", layers: int = 2) -> dict[str, tuple[int, ...]]:
    """All norms of a Gemma 3 text model, and two tensors that are none."""
    shapes: dict[str, tuple[int, ...]] = {f"{root}embed_tokens.weight": (32, 8)}
    shapes |= names_of(*(f"{root}layers.{{i}}.{n}" for n in [*STD4, *QK]), layers=layers)
    return shapes | {f"{root}layers.0.mlp.up_proj.weight": (16, 8), f"{root}norm.weight": (8,)}


GEMMA3 = {"model_type": "gemma3_text", "num_hidden_layers": 2}


def single(config: dict[str, Any], name: str) -> tuple[Kind, Classification]:
    """The kind of one tensor of an otherwise empty checkpoint: nothing but its name can tell."""
    found = classify(config, {name: (8,)})
    return found.rules[name].kind, found


HYBRID = {
    "model_type": "qwen3_next",
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}


def hybrid() -> dict[str, tuple[int, ...]]:
    pre = [f"model.layers.{{i}}.{n}" for n in STD4[:2]]
    shapes = names_of(*pre, "model.norm.weight", "model.layers.0.linear_attn.norm.weight")
    shapes["model.layers.0.linear_attn.conv1d.weight"] = (24, 1, 4)
    return shapes | names_of(*(f"model.layers.1.{n}" for n in QK))
