"""Rows of the Step 3.5 and 3.7 families."""

from __future__ import annotations

from gemma_fold.rules.families.common import LANGUAGE_MODEL, PRE_NORMS, QK_NORMS, VISION_NORM, ran
from gemma_fold.rules.model import Evidence, Kind
from gemma_fold.rules.row import Converted, Family, Norm, Part, Plain

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
STEP = (
    Family(
        model_types=("step3p5",),
        architectures=("Step3p5ForCausalLM",),
        draft_layers="num_nextn_predict_layers",
        norms=(
            Norm(PRE_NORMS),
            Norm(QK_NORMS),
            Norm("norm.weight"),
            Norm("layers.{i}.{enorm,hnorm}.weight", optional=True, evidence=_STEP_MTP),
            Norm(
                "layers.{i}.{,transformer.}shared_head.norm.weight",
                optional=True,
                evidence=_STEP_MTP,
            ),
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
)
