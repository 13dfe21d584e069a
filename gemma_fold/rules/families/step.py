"""Rows of the Step 3.5, 3.7 and 5 families."""

from __future__ import annotations

from gemma_fold.rules.families.common import LANGUAGE_MODEL, PRE_NORMS, QK_NORMS, VISION_NORM, ran
from gemma_fold.rules.model import Evidence, Kind
from gemma_fold.rules.row import Converted, Family, Norm, Part, Plain, Switch, is_true

_STEP_VISION = (
    Plain("{,model.}vision_model.ln_{pre,post}.weight", VISION_NORM),
    Plain("{,model.}vision_model.transformer.resblocks.{i}.ln_{1,2}.weight", VISION_NORM),
    Plain(
        "{,model.}vision_model.transformer.resblocks.{i}.ls_{1,2}.gamma",
        "layer scale, not a norm",
        Kind.OTHER,
    ),
)
_STEP_MTP = Evidence("read", "vLLM 0.32 models/step3p5_mtp.py:42-67,340-345")
_STEP5_MTP = Evidence("read", "vLLM 0.33 models/step5/nvidia/mtp.py:60-80,105-106,396-399")
_STEP5_INDEXER = Evidence("read", "vLLM 0.33 models/step5/nvidia/model.py:1231-1239")


def _drafts(evidence: Evidence) -> tuple[Norm, ...]:
    """Norms of the draft layers, which follow the others and have those of each layer too."""
    return (
        Norm("layers.{i}.{enorm,hnorm}.weight", optional=True, evidence=evidence),
        Norm("layers.{i}.{,transformer.}shared_head.norm.weight", optional=True, evidence=evidence),
    )


STEP = (
    Family(
        model_types=("step3p5",),
        architectures=("Step3p5ForCausalLM",),
        draft_layers="num_nextn_predict_layers",
        norms=(
            Norm(PRE_NORMS),
            Norm(QK_NORMS),
            Norm("norm.weight"),
            *_drafts(_STEP_MTP),
        ),
        converted=(Converted("layers.{i}.mlp.switch_mlp.{up,down,gate}_proj.weight", "MLX"),),
        evidence=ran("step3p7/modeling_step3p7.py:501"),
    ),
    Family(
        model_types=("step3p7",),
        roots=("",),
        plain=_STEP_VISION,
        parts=(Part("text_config", LANGUAGE_MODEL, model_type="step3p5"),),
        evidence=ran("step3p7/modeling_step3p7.py:501"),
    ),
    Family(  # vLLM runs it zero-centred only; its norm class is plain without the switch
        model_types=("step5",),
        architectures=("Step5ForCausalLM",),
        draft_layers="num_nextn_predict_layers",
        switches=(Switch("zero_centered", is_true, absent=True),),
        norms=(
            Norm(PRE_NORMS),
            Norm(QK_NORMS),
            Norm("norm.weight"),
            Norm(
                "layers.{i}.self_attn.sparse_indexer_q_norm.weight",
                optional=True,
                evidence=_STEP5_INDEXER,
            ),
            *_drafts(_STEP5_MTP),
        ),
        plain=(
            Plain(
                "layers.{i}.self_attn.sparse_indexer_k_norm.weight",
                "LayerNorm of the sparse indexer: its weight is the gain itself, "
                "though that of sparse_indexer_q_norm is zero-centred",
            ),
        ),
        evidence=Evidence(
            "read",
            "vLLM 0.33 models/step5/nvidia/layernorm.py:27-40,110-121, "
            "model.py:1136-1146,1961-1972",
        ),
    ),
    Family(
        model_types=("step5_vl",),
        roots=("",),
        plain=_STEP_VISION,
        parts=(Part("text_config", LANGUAGE_MODEL, model_type="step5"),),
        evidence=Evidence("read", "vLLM 0.33 models/step5/nvidia/vl.py:12-25"),
    ),
)
