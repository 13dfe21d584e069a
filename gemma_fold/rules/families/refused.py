"""Rows of models that have zero-centred norms and cannot be folded, each with the reason."""

from __future__ import annotations

from gemma_fold.rules.model import Evidence
from gemma_fold.rules.row import Family

_DIFFUSION = (
    "its weight files have no names that a rule could be tested on; "
    "fold the text encoder's own folder instead"
)


def _seen(place: str) -> Evidence:
    """Read in SGLang: `place` is file and line below the models of its generation."""
    return Evidence("read", f"SGLang 0.5.23 multimodal_gen/runtime/models/{place}")


REFUSED = (
    Family(
        model_types=("QwenImage21Transformer2DModel",),
        refuse=f"text_norm of this diffusion transformer is zero-centred, and {_DIFFUSION}",
        evidence=_seen("dits/qwen_image21.py:283-302"),
    ),
    Family(
        model_types=("Krea2Transformer2DModel",),
        refuse=f"all RMSNorms of this diffusion transformer are zero-centred, and {_DIFFUSION}",
        evidence=_seen("dits/krea2.py:175-193"),
    ),
    Family(
        model_types=("pi05",),
        refuse=(
            "the norms of its action expert compute their gain from the time step, "
            "so there is no weight to fold"
        ),
        evidence=_seen("vlas/pi05_core.py:123-160"),
    ),
    Family(
        model_types=("musespark1x_text",),
        refuse=(
            "its config is of vLLM 0.33, which has no model that reads it, and offsets of its "
            "norms would depend on the layer; fold a muse_spark checkpoint instead"
        ),
        evidence=Evidence("read", "vLLM 0.33 transformers_utils/configs/muse_spark.py:80-295"),
    ),
    Family(
        model_types=(
            "moonshine_streaming_encoder",
            "t5_gemma_module",
            "t5gemma2_decoder",
            "t5gemma2_encoder",
            "t5gemma2_text",
        ),
        refuse="it is a half of a model and never saved alone; fold the whole model",
        evidence=Evidence("executed", "transformers 5.23 and 5.24, inside the whole models"),
    ),
)
