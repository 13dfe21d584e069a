"""How many of the tasks a model gets right, run by vLLM, SGLang or transformers.

    python examples/task_accuracy/run.py gemma-3-270m-folded --engine vllm --json result.json

The model is a folder or a Hub id, original or folded; GEMMA_FOLD chooses the mode, as everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tasks import Task, answer_of, read, score

TOKENS = 24  # the longest answer has fewer
Continue = Callable[[str, str, Sequence[str]], list[str]]


def vllm(model: str, dtype: str, prompts: Sequence[str]) -> list[str]:
    """Continuations of the prompts, up to a line's end."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype=dtype, max_model_len=512)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, stop=["\n"])
    return [one.outputs[0].text for one in llm.generate(list(prompts), params)]


def sglang(model: str, dtype: str, prompts: Sequence[str]) -> list[str]:
    """The same. On a CPU, without the graphs that SGLang would compile for a GPU."""
    import sglang
    import torch

    cpu = {} if torch.accelerator.is_available() else {"device": "cpu", "disable_cuda_graph": True}
    engine = sglang.Engine(model_path=model, dtype=dtype, context_length=512, **cpu)
    params = {"temperature": 0, "max_new_tokens": TOKENS, "stop": ["\n"]}
    try:
        return [one["text"] for one in engine.generate(list(prompts), params)]
    finally:
        engine.shutdown()


def transformers(model: str, dtype: str, prompts: Sequence[str]) -> list[str]:
    """The same, one prompt at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gemma_fold.engines.transformers import install

    install()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").to(loaded.device)
        out = loaded.generate(
            **ids, max_new_tokens=TOKENS, do_sample=False, stop_strings=["\n"], tokenizer=tokenizer
        )
        answers.append(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
    return answers


ENGINES: dict[str, Continue] = {"vllm": vllm, "sglang": sglang, "transformers": transformers}


def result(tasks: Sequence[Task], answers: Sequence[str]) -> dict[str, Any]:
    """Scores and every answer, for JSON."""
    scores = {
        name: {
            "right": one.right,
            "tasks": one.tasks,
            "accuracy": one.accuracy,
            "standard_error": one.standard_error,
        }
        for name, one in score(tasks, answers).items()
    }
    given = {task.id: answer for task, answer in zip(tasks, answers, strict=True)}
    return {"scores": scores, "answers": given}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--engine", choices=ENGINES, default="vllm")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--limit", type=int, help="tasks to ask, of all kinds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    tasks = read(given.limit)
    said = ENGINES[given.engine](given.model, given.dtype, [task.prompt for task in tasks])
    found = result(tasks, [answer_of(one) for one in said])
    for name, one in found["scores"].items():
        print(
            f"{name:15} {one['right']:4} of {one['tasks']:4}  "
            f"{100 * one['accuracy']:5.1f} % ± {100 * one['standard_error']:.1f}"
        )
    if given.json:
        run = {
            "model": given.model,
            "engine": f"{given.engine} {version(given.engine)}",
            "dtype": given.dtype,
            "mode": os.environ.get("GEMMA_FOLD"),
        }
        given.json.write_text(json.dumps({**run, **found}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
