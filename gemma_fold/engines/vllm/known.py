"""The models of vLLM whose norms native mode knows how to run, with the code that was read.

The digests are of vLLM 0.26 to 0.33. Another forward is run on stand-ins first; where it does more
with what one norm hands to the next than pass it on, the model is left to stock mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from gemma_fold.engines.attach.handed import (
    Methods,
    layer_problem,
    methods_of,
    model_problem,
)
from gemma_fold.engines.known_code import statements_digest

_MODELS = "vllm.model_executor.models."
_MODEL = "99d83b5736f8cc35277e99235ac2b9a4bec0e98e67b8efdd70da08b2c97d85b6"
_QWEN_LAYER = (
    "209672e4b2cf3e14c397d68a45f3c2f9556b990974f0416cb6f8aed7daba5b83",
    "83e013e018b60d12ce7f5bb366589f39ac91fa5db3fc27d3e75a900b9a97812e",
)
_QWEN_MODEL = (
    "4369b2e054cd41dab58c255277e55212a83007a23ebf944983b382ddf6bc3297",
    "5b7360f7c00f4b5dbf70b630d80c3df38f5db0c29bd648177ac50f51969f1855",
)


@dataclass(frozen=True, slots=True)
class Family:
    """A decoder of vLLM.

    layout: sandwich: a norm before and after each block; add_norm: a norm before each block.
    model, layer: class names, in `module` of vLLM's models.
    model_forwards, layer_forwards: digests of their forwards.
    qk_norms: whether q and k are normed by modules that are only called, by an attention whose
        forward has the digest `attention_forward`.
    """

    layout: Literal["sandwich", "add_norm"]
    module: str
    model: str
    layer: str
    model_forwards: tuple[str, ...]
    layer_forwards: tuple[str, ...]
    qk_norms: bool = False
    attention_forward: str = ""


FAMILIES = (
    Family(
        "add_norm",
        "gemma",
        "GemmaModel",
        "GemmaDecoderLayer",
        (_MODEL, "bdd40834f86e9aca17a26b1fe0f9041ade33986f4fb3caa29c60974961c9e373"),
        ("9e7bb04a8ecab77c19acafe7b81546973e72843e48f441257c665e027e5e5e4a",),
    ),
    Family(
        "sandwich",
        "gemma2",
        "Gemma2Model",
        "Gemma2DecoderLayer",
        (_MODEL,),
        ("3377dedd55965f4bfdf5ae812c3de4e12a6c0853b5bd0414a40d016f7b045650",),
    ),
    Family(
        "sandwich",
        "gemma3",
        "Gemma3Model",
        "Gemma3DecoderLayer",
        ("958a38a605f68d42eb21b0c80ab56d906ec02dfc4e5d8fffa95d39956fef8f25",),
        ("0f8838dd2c960a20c90296d7c2ced2e6c52d56b622ac4fb788ec11778625f665",),
        qk_norms=True,
        attention_forward="e5761aa386434bcde4569517020fdc52c95bb1ac7b10cac1a85d2a56d23aad47",
    ),
    # The q and k norms of Qwen stay vLLM's: on CUDA a fused kernel reads their raw weights.
    Family(
        "add_norm",
        "qwen3_next",
        "Qwen3NextModel",
        "Qwen3NextDecoderLayer",
        _QWEN_MODEL,
        _QWEN_LAYER,
    ),
    Family(
        "add_norm",
        "qwen3_5",
        "Qwen3_5Model",
        "Qwen3_5DecoderLayer",
        _QWEN_MODEL,
        _QWEN_LAYER,
    ),
)
_BY_MODEL = {(_MODELS + family.module, family.model): family for family in FAMILIES}


def family_of(model: nn.Module) -> Family | None:
    """The family of a decoder, by the class of the module itself; None for anything else."""
    cls = type(model)
    return _BY_MODEL.get((cls.__module__, cls.__name__))


def unknown(family: Family, model: nn.Module, layers: list[nn.Module]) -> str:
    """Why `model` and its layers may not be native; empty where they may."""
    if any(type(layer).__name__ != family.layer for layer in layers):
        return f"its layers are no {family.layer}"
    problem = unknown_model(family, methods_of(type(model)), model)
    for layer in layers:
        problem = problem or unknown_layer(family, methods_of(type(layer)), layer)
    return problem


def unknown_model(family: Family, methods: Methods, real: Any = None) -> str:
    """Why a class may not be native: empty where its forward is code that was read, or only passes
    on what one norm hands to the next."""
    if statements_digest(methods.get("forward")) in family.model_forwards:
        return ""
    problem = model_problem(methods, real)
    return f"{family.model}.forward: {problem}" if problem else ""


def unknown_layer(family: Family, methods: Methods, real: Any = None) -> str:
    """:func:`unknown_model` for a layer."""
    if statements_digest(methods.get("forward")) in family.layer_forwards:
        return ""
    problem = layer_problem(methods, family.layout, real)
    return f"{family.layer}.forward: {problem}" if problem else ""
