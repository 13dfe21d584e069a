"""Fold a checkpoint, load it in transformers, and let it go on from a prompt.

    python examples/convert_and_chat.py google/gemma-3-270m folded "The capital of France is"

The first argument is a folder or a Hub id; a second run finds the folded folder and only loads it.
Any Gemma, Qwen3-Next, Qwen3.5, ... works the same: `gemma-fold inspect` says whether one does.
"""

import sys
from pathlib import Path

from transformers import AutoTokenizer

import gemma_fold


def main(source: str, folded: str, prompt: str) -> None:
    if not Path(folded).exists():  # absent or complete, never half of it
        report = gemma_fold.convert(source, folded)
        print(f"folded {report.tensors} norms, {report.elements:,} weights", file=sys.stderr)

    model = gemma_fold.load(folded)  # a Hub id will do, too; device_map="auto", dtype=..., as ever
    tokenizer = AutoTokenizer.from_pretrained(folded)
    if tokenizer.chat_template:  # an instruction-tuned model has a form for what it is asked
        asked = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    inputs = inputs.to(model.device)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
