"""Fold a model that is already loaded, and see that it still says the same, bit for bit.

    python examples/fold_in_memory.py google/gemma-3-270m

No conversion is needed for this; the checkpoint on disk stays as it is.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gemma_fold


def main(checkpoint: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer("Photosynthesis is the process by which", return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
        gemma_fold.fold_model(model)
        after = model(**inputs).logits
        gemma_fold.unfold_model(model)
        again = model(**inputs).logits
    print(f"logits after folding:   {'identical' if torch.equal(before, after) else 'different'}")
    print(f"logits after unfolding: {'identical' if torch.equal(before, again) else 'different'}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
