"""Count the norm weights that llm-compressor changes, whatever the recipe.

    pip install llmcompressor
    python examples/llm_compressor_norms.py google/gemma-3-270m

For Gemma 3 270M it prints "12,994 of 55,936 norm weights changed". It needs nothing but
llm-compressor: the model is loaded, its `norm_calibration_context` is entered and left with nothing
in between, as `oneshot` does around every recipe, and each norm is compared with what it was.

The finding, to report upstream
-------------------------------
llmcompressor 0.14.0.1, modeling/offset_norm.py: while a recipe runs, norms that compute
`output * (1 + weight)` are replaced by `CalibrationOffsetNorm`, which holds `1 + weight` in the
dtype of the weight; afterwards the weight becomes that minus 1. Numbers of bfloat16 from 0.5 to 2
have steps of 2**-8 and 2**-7, far coarser than those of a weight near 0, so the sum is rounded and
the weight does not come back, even if no modifier touched it. `oneshot` enters this context for
every recipe (entrypoints/oneshot.py), those that never scale a norm, such as FP8_DYNAMIC, too.

Keeping the replacement's weight in float32 changes nothing: 1 + w of these bfloat16 weights is
exact there, and rounding back to bfloat16 after the subtraction returns w. In `__init__`:

    self.weight = torch.nn.Parameter(1.0 + original.weight.data.float())

Modifiers then see a float32 norm weight, which they only multiply or divide.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import torch
from llmcompressor.modeling.offset_norm import norm_calibration_context
from transformers import AutoModelForCausalLM


def main(checkpoint: str) -> None:
    """Print how many weights of the model's norms are others after the context."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with norm_calibration_context(model):
        replaced = [
            f"{name}.weight"
            for name, module in model.named_modules()
            if type(module).__name__ == "CalibrationOffsetNorm"
        ]
    after = model.state_dict()
    changed = sum(int(torch.count_nonzero(after[name] != before[name])) for name in replaced)
    elements = sum(before[name].numel() for name in replaced)
    again = sum(
        int(torch.count_nonzero((1.0 + before[n].float() - 1.0).to(before[n].dtype) != before[n]))
        for n in replaced
    )
    print(f"llmcompressor {version('llmcompressor')}, {checkpoint}: {len(replaced)} norms")
    print(f"{changed:,} of {elements:,} norm weights changed")
    print(f"{again:,} would, were 1 + w kept in float32")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
