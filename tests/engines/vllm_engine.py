"""A real vLLM engine in a test's process: start it, let it write, compare two of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

#: Where a picture goes, by model type.
PICTURES = {
    "gemma3": (5, 17, 91, 23),
    "paligemma": (5, 17, 23),
    "qwen3_5": (5, 17, 92, 90, 93, 23),
    "qwen3_5_moe": (5, 17, 92, 90, 93, 23),
}
PROMPTS = ((5, 17, 99, 23, 4, 61, 7), (300, 2, 41), (8,) * 20, tuple(range(77, 87)))
TOKENS = 48
Outputs = list[dict[str, Any]]


@contextmanager
def engine(folder: Path, mode: str | None = None, **options: Any) -> Iterator[Any]:
    """A vLLM engine. `mode` is GEMMA_FOLD; None leaves it unset."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ.pop("GEMMA_FOLD", None)
    if mode is not None:
        os.environ["GEMMA_FOLD"] = mode
    settings = {
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 1 << 25,
        "skip_tokenizer_init": not (folder / "tokenizer_config.json").exists(),
        "distributed_executor_backend": "mp" if "tensor_parallel_size" in options else "uni",
        **options,
    }
    llm = LLM(str(folder), **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def outputs(
    llm: Any, adapter: Path | None = None, prompts: Sequence[Sequence[int]] = PROMPTS
) -> Outputs:
    """48 greedy tokens after each prompt, with the top 5 log-probabilities of all positions.

    One more prompt has a picture, if the model sees pictures.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=5,
        prompt_logprobs=5,
    )
    asked: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    lora = None
    if adapter is not None:
        from vllm.lora.request import LoRARequest

        lora = LoRARequest("adapter", 1, str(adapter))
    picture = PICTURES.get(llm.llm_engine.vllm_config.model_config.hf_config.model_type)
    if picture:
        asked.append({"prompt_token_ids": list(picture), "multi_modal_data": _picture()})
    return [
        {
            "tokens": list(request.outputs[0].token_ids),
            "logprobs": [_plain(top) for top in request.outputs[0].logprobs],
            "prompt": [_plain(top) for top in request.prompt_logprobs if top],
        }
        for request in llm.generate(asked, params, use_tqdm=False, lora_request=lora)
    ]


def _picture() -> dict[str, Any]:
    from PIL import Image

    pixels = torch.arange(8 * 8 * 3, dtype=torch.uint8).view(8, 8, 3)
    return {"image": Image.fromarray(pixels.numpy())}


def _plain(top: Any) -> dict[int, float]:
    return {token: entry.logprob for token, entry in top.items()}


def compare(a: Outputs, b: Outputs) -> dict[str, Any]:
    """How many tokens differ, and the largest difference of a log-probability of the prompts."""
    pairs = list(zip(a, b, strict=True))
    tokens = [
        (x, y) for one, two in pairs for x, y in zip(one["tokens"], two["tokens"], strict=True)
    ]
    differences = [
        abs(top[token] - other[token])
        for one, two in pairs
        for top, other in zip(one["prompt"], two["prompt"], strict=True)
        for token in top.keys() & other.keys()
    ]
    return {
        "identical": a == b,
        "tokens": len(tokens),
        "different_tokens": sum(x != y for x, y in tokens),
        "max_logprob_difference": max(differences),
        "distinct_tokens": len({x for x, _ in tokens}),
    }


def run(folder: Path, mode: str | None = None, **options: Any) -> Outputs:
    with engine(folder, mode, **options) as llm:
        return outputs(llm)
