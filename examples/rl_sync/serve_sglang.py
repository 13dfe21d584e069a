"""A running SGLang for `run.py`: `python serve_sglang.py FD MODEL FOLDER`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import recorder
import torch
from rollout import answer


class Rollout:
    """SGLang, whose scheduler is a process of its own."""

    def __init__(self, model: str, folder: Path) -> None:
        from sglang import Engine

        self._folder = folder
        config = json.loads((Path(model) / "config.json").read_text())
        layers = config.get("base_config", config)["num_hidden_layers"]
        self._engine: Any = Engine(
            model_path=model,
            dtype="bfloat16",
            device="cpu",
            skip_tokenizer_init=True,
            disable_radix_cache=True,
            cuda_graph_backend_decode="disabled",
            cuda_graph_backend_prefill="disabled",
            sampling_backend="pytorch",
            grammar_backend="none",
            skip_server_warmup=True,
            context_length=256,
            max_total_tokens=2048,
            max_running_requests=8,
            forward_hooks=[
                {
                    "name": name,
                    "target_modules": [name],
                    "hook_factory": "recorder:hook",
                    "config": {"folder": str(folder), "name": name},
                }
                for name in (*recorder.names(layers), recorder.EMBEDDING)
            ],
        )

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("sglang", "torch")}

    def sample(self, prompts: list[list[int]], count: int, tokens: int, seed: int) -> Any:
        """`count` answers to each prompt: their tokens, and the log-probability of each."""
        params = {"temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True}
        asked = [prompt for prompt in prompts for _ in range(count)]
        found = [
            [(token, logprob) for logprob, token, _ in one["meta_info"]["output_token_logprobs"]]
            for one in self._engine.generate(
                input_ids=asked, sampling_params=params, return_logprob=True
            )
        ]
        return [found[i : i + count] for i in range(0, len(found), count)]

    def score(self, ids: list[int]) -> list[float]:
        """The log-probability of every token after the first, in one pass; the hooks write."""
        with recorder.recording(self._folder):
            found = self._engine.generate(
                input_ids=ids,
                sampling_params={"temperature": 0, "max_new_tokens": 1},
                return_logprob=True,
                logprob_start_len=0,
            )
        return [logprob for logprob, _, _ in found["meta_info"]["input_token_logprobs"][1:]]

    def update(self, file: str) -> None:
        """Take the tensors in `file`, by SGLang's own update of a running model."""
        tensors = list(torch.load(file).items())
        session = hasattr(self._engine, "begin_weight_update")
        if session:
            self._engine.begin_weight_update()
        succeeded, message = self._engine.update_weights_from_tensor(named_tensors=tensors)
        if session:
            self._engine.end_weight_update()
        if not succeeded:
            raise RuntimeError(message)


if __name__ == "__main__":
    answer(Rollout)
