"""Rows of the Gemma families."""

from __future__ import annotations

from gemma_fold.rules.families.common import (
    PRE_NORMS,
    QK_NORMS,
    SANDWICH,
    TEXT_ROOTS,
    VISION_NORM,
    ran,
)
from gemma_fold.rules.row import Family, Norm, Part, Plain

_SIGLIP = (
    Plain("vision_tower.{,vision_model.}encoder.layers.{i}.layer_norm{1,2}.weight", VISION_NORM),
    Plain(
        "vision_tower.{,vision_model.}{post_layernorm,head.layernorm}.weight",
        VISION_NORM + ", though the name ends like a Gemma norm",
    ),
)
_LANGUAGE_MODEL = ("language_model.", "model.language_model.")

GEMMA = (
    Family(
        model_types=("gemma",),
        roots=TEXT_ROOTS,
        norms=(Norm(PRE_NORMS), Norm("norm.weight")),
        evidence=ran("gemma/modeling_gemma.py:63"),
    ),
    Family(
        model_types=("gemma2",),
        roots=TEXT_ROOTS,
        norms=(Norm(SANDWICH), Norm("norm.weight")),
        evidence=ran("gemma2/modeling_gemma2.py:48"),
    ),
    Family(  # also EmbeddingGemma (a base model, so without `model.`) and Rnj-1
        model_types=("gemma3_text",),
        architectures=("Rnj1ForCausalLM",),
        roots=TEXT_ROOTS,
        norms=(Norm(SANDWICH), Norm(QK_NORMS), Norm("norm.weight")),
        evidence=ran("gemma3/modeling_gemma3.py:135"),
    ),
    Family(
        model_types=("gemma3",),
        roots=("", "model."),
        norms=(Norm("multi_modal_projector.mm_soft_emb_norm.weight"),),
        plain=_SIGLIP,
        parts=(Part("text_config", _LANGUAGE_MODEL, model_type="gemma3_text"),),
        evidence=ran("gemma3/modeling_gemma3.py:135"),
    ),
    Family(
        model_types=("shieldgemma2",),
        roots=("model.", "model.model.", ""),
        norms=(Norm("multi_modal_projector.mm_soft_emb_norm.weight"),),
        plain=_SIGLIP,
        parts=(
            Part(
                "text_config",
                (*_LANGUAGE_MODEL, "model.model.language_model."),
                default="gemma3_text",
            ),
        ),
        evidence=ran("gemma3/modeling_gemma3.py:135"),
    ),
    Family(
        model_types=("paligemma",),
        roots=("", "model."),
        plain=_SIGLIP,
        parts=(Part("text_config", _LANGUAGE_MODEL, default="gemma"),),
        evidence=ran("paligemma/modeling_paligemma.py, text by its own model_type"),
    ),
    Family(
        model_types=("colpali",),
        roots=("",),
        parts=(Part("vlm_config", ("vlm.", ""), default="paligemma"),),
        evidence=ran("colpali/modeling_colpali.py, text by its own model_type"),
    ),
    Family(
        model_types=("pi0",),
        roots=("",),
        parts=(
            Part(
                "vlm_config",
                ("{,model.}paligemma_with_expert.paligemma.{,model.}", "{,model.}vlm."),
                default="paligemma",
            ),
            Part(
                "dit_config",
                ("{,model.}paligemma_with_expert.gemma_expert.", "{,model.}dit."),
                default="gemma",
            ),
        ),
        evidence=ran("pi0/modeling_pi0.py, both halves by their own model_type"),
    ),
    Family(
        model_types=("vaultgemma",),
        roots=TEXT_ROOTS,
        norms=(
            Norm("layers.{i}.{input,pre_feedforward}_layernorm.weight"),
            Norm("norm.weight"),
        ),
        evidence=ran("vaultgemma/modeling_vaultgemma.py:45"),
    ),
    Family(
        model_types=("recurrent_gemma",),
        norms=(
            Norm("layers.{i}.{temporal,channel}_pre_norm.weight"),
            Norm("final_norm.weight"),
        ),
        evidence=ran("recurrent_gemma/modeling_recurrent_gemma.py:44"),
    ),
    Family(
        model_types=("t5gemma",),
        norms=(
            Norm(
                "encoder.layers.{i}.{pre,post}_{self_attn,feedforward}_layernorm.weight",
                layers="encoder.num_hidden_layers",
            ),
            Norm(
                "decoder.layers.{i}.{pre,post}_{self_attn,cross_attn,feedforward}_layernorm.weight",
                layers="decoder.num_hidden_layers",
                unless_false="is_encoder_decoder",
            ),
            Norm("encoder.norm.weight"),
            Norm("decoder.norm.weight", unless_false="is_encoder_decoder"),
        ),
        evidence=ran("t5gemma/modeling_t5gemma.py:60"),
    ),
    Family(
        model_types=("t5gemma2",),
        norms=(
            Norm(
                "encoder.layers.{i}.{pre,post}_{self_attn,feedforward}_layernorm.weight",
                layers="encoder.text_config.num_hidden_layers",
            ),
            Norm(
                "encoder.layers.{i}.self_attn.{q,k}_norm.weight",
                layers="encoder.text_config.num_hidden_layers",
            ),
            Norm(
                "decoder.layers.{i}.{pre,post}_{self_attn,feedforward}_layernorm.weight",
                layers="decoder.num_hidden_layers",
            ),
            Norm(
                "decoder.layers.{i}.self_attn.{q,k}_norm.weight",
                layers="decoder.num_hidden_layers",
            ),
            Norm("{encoder,decoder}.norm.weight"),
            Norm("encoder.multi_modal_projector.mm_soft_emb_norm.weight"),
        ),
        plain=tuple(Plain("encoder." + trap.names, trap.why) for trap in _SIGLIP),
        evidence=ran("t5gemma2/modeling_t5gemma2.py:54"),
    ),
)
