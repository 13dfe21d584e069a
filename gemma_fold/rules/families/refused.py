"""Rows of models that have zero-centred norms and cannot be folded, each with the reason."""

from __future__ import annotations

from gemma_fold.rules.model import Evidence
from gemma_fold.rules.row import Family

_DIFFUSION = (
    "its weight files have no names that a rule could be tested on; "
    "fold the text encoder's own folder instead"
)
_READ = "SGLang 0.5.23 multimodal_gen/runtime/models/"

REFUSED = (
    Family(
        model_types=("QwenImage21Transformer2DModel",),
        refuse=f"text_norm of this diffusion transformer is zero-centred, and {_DIFFUSION}",
        evidence=Evidence("read", _READ + "dits/qwen_image21.py:283-302"),
    ),
    Family(
        model_types=("Krea2Transformer2DModel",),
        refuse=f"all RMSNorms of this diffusion transformer are zero-centred, and {_DIFFUSION}",
        evidence=Evidence("read", _READ + "dits/krea2.py:175-193"),
    ),
    Family(
        model_types=("pi05",),
        refuse=(
            "the norms of its action expert compute their gain from the time step, "
            "so there is no weight to fold"
        ),
        evidence=Evidence("read", _READ + "vlas/pi05_core.py:123-160"),
    ),
)
