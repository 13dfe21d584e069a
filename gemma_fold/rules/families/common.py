"""Name patterns and evidence that rows share."""

from __future__ import annotations

from gemma_fold.rules.model import Evidence

PRE_NORMS = "layers.{i}.{input,post_attention}_layernorm.weight"
QK_NORMS = "layers.{i}.self_attn.{q,k}_norm.weight"
SANDWICH = "layers.{i}.{input,post_attention,pre_feedforward,post_feedforward}_layernorm.weight"

#: Causal models, base models, and question answering models.
TEXT_ROOTS = ("model.", "", "transformer.")
#: Where vision-language models keep their language model, oldest habits last.
LANGUAGE_MODEL = ("model.language_model.", "language_model.", "model.", "")

VISION_NORM = "LayerNorm of the vision tower: its weight is the gain itself"


def ran(place: str) -> Evidence:
    """Executed in transformers: `place` is the norm's file and line below its models folder."""
    return Evidence("executed", f"transformers 5.23 models/{place}")
