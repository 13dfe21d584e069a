"""Generate text with a folded checkpoint.

    gemma-fold convert google/gemma-3-270m -o gemma-3-270m-folded
    python examples/load_folded.py gemma-3-270m-folded "The capital of France is"

Any Gemma, Qwen3-Next, Qwen3.5, ... works the same; see `gemma-fold inspect`.
"""

import sys

from transformers import AutoTokenizer

import gemma_fold


def main(folder: str, prompt: str) -> None:
    model = gemma_fold.load(folder)  # a folder or a Hub id; device_map="auto", dtype=..., as ever
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
