"""vLLM as a backend, through its own Python interface."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from typing import Any

from gemma_fold.compare.outputs.backend import (
    Answer,
    EngineSide,
    Ids,
    Listed,
    does_not_run,
)
from gemma_fold.compare.outputs.server import TOP_K
from gemma_fold.engines.serve import check_plugin
from gemma_fold.errors import GemmaFoldError, first_line


def prepare() -> None:
    """Check that vLLM is there; its log stays off stdout, its processes start afresh."""
    check_plugin("vllm")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # A fork of this process, which has asked about GPUs, could not use any.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def start(side: EngineSide, dtype: str, longest: int, together: int) -> _Vllm:
    """Start vLLM on the checkpoint; what it holds at once is its own choice."""
    from vllm import LLM
    from vllm.platforms import current_platform

    try:
        llm = LLM(
            str(side.side.root),
            dtype=dtype,
            max_model_len=longest,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
            # To compile on a CPU would take longer than the run.
            enforce_eager=side.eager or current_platform.is_cpu(),
        )
    except GemmaFoldError:
        raise
    except Exception as error:
        raise does_not_run("vLLM", side, first_line(error)) from error
    return _Vllm(llm)


class _Vllm:
    """A backend."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        config = llm.llm_engine.vllm_config
        self.dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.device = str(config.device_config.device_type)

    def continue_all(
        self, texts: Sequence[Ids], tokens: int, *, reads: bool = False, draws: bool = False
    ) -> list[Answer]:
        from vllm import SamplingParams

        params: dict[str, Any] = {"temperature": 0}
        if draws:
            params = {"temperature": 1.0, "seed": 0, "ignore_eos": True, "logprobs": TOP_K}
        if reads:
            params["prompt_logprobs"] = TOP_K
        settings = SamplingParams(max_tokens=tokens, detokenize=False, **params)
        prompts = [{"prompt_token_ids": list(text)} for text in texts]
        found = self._llm.generate(prompts, settings, use_tqdm=False)
        return [
            _answer(text, one.outputs[0], one.prompt_logprobs if reads else ())
            for text, one in zip(texts, found, strict=True)
        ]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()


def _answer(text: Ids, output: Any, read: Sequence[Any]) -> Answer:
    ids = tuple(output.token_ids)
    return Answer(
        ids,
        list(map(_listed, text[1:], read[1:])),
        list(map(_listed, ids, output.logprobs or ())),
    )


def _listed(token: int, entries: Any) -> Listed:
    # The token itself is among them, however unlikely it is.
    top = {i: entry.logprob for i, entry in entries.items() if entry.rank <= TOP_K}
    return Listed(entries[token].logprob, top)
