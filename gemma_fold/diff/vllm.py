"""Side A or B run by vLLM, offline: the top k at every position, as its server would give them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gemma_fold.diff.endpoint import TOP_K, Position
from gemma_fold.diff.sides import Side
from gemma_fold.diff.tokens import Tokens, first_line
from gemma_fold.errors import GemmaFoldError, UnsupportedModelError
from gemma_fold.runtime.vllm.server import check_environment

Text = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VllmSide:
    """A checkpoint that vLLM runs."""

    side: Side


def import_vllm() -> None:
    """Check that vLLM is there; its log stays off stdout, its processes start afresh."""
    check_environment()
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # A fork of this process, which has asked about GPUs, could not use any.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


class _Engine:
    """A source of :mod:`gemma_fold.diff.top`."""

    def __init__(self, llm: Any, name: Callable[[int], str], tokens: Tokens) -> None:
        self._llm = llm
        self._name = name
        self._tokens = tokens
        config = llm.llm_engine.vllm_config
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.name = f"vllm, {dtype} on {config.device_config.device_type}"

    def read(self, text: Text) -> list[Position]:
        return self.read_together([text])[0]

    def read_together(self, texts: Sequence[Text]) -> list[list[Position]]:
        answers = self._generate(texts, max_tokens=1, prompt_logprobs=TOP_K)
        return [
            list(map(self._position, text[1:], answer.prompt_logprobs[1:]))
            for text, answer in zip(texts, answers, strict=True)
        ]

    def continue_greedily(self, text: Text, tokens: int) -> tuple[tuple[str, ...], str]:
        ids = tuple(self._generate([text], max_tokens=tokens)[0].outputs[0].token_ids)
        return tuple(map(self._name, ids)), self._tokens.text(ids)

    def _generate(self, texts: Sequence[Text], **params: Any) -> Any:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(text)} for text in texts]
        greedy = SamplingParams(temperature=0, detokenize=False, **params)
        return self._llm.generate(prompts, greedy, use_tqdm=False)

    def _position(self, token: Any, listed: dict[int, Any]) -> Position:
        top = {i: entry.logprob for i, entry in listed.items() if entry.rank <= TOP_K}
        named = {self._name(i): p for i, p in top.items()}
        return Position(self._name(token), listed[token].logprob, named)


@contextmanager
def running(
    side: VllmSide, tokens: Tokens, dtype: str, new_tokens: int, name: Callable[[int], str]
) -> Iterator[_Engine]:
    """Start vLLM on the checkpoint, and end it.

    `name` spells a token. Raises UnsupportedModelError where vLLM does not run the checkpoint.
    """
    windows = [len(window) + 1 for window in tokens.windows]
    prompts = [len(prompt.ids) + new_tokens for prompt in tokens.prompts]
    llm = _start(side.side, dtype, max(windows + prompts))
    try:
        yield _Engine(llm, name, tokens)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def _start(side: Side, dtype: str, longest: int) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    try:
        return LLM(
            str(side.root),
            dtype=dtype,
            max_model_len=longest,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
            # On a CPU compiling takes longer than all there is to run.
            enforce_eager=current_platform.is_cpu(),
        )
    except GemmaFoldError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"vLLM does not run {side.name} ({first_line(error)}); its log is above, and "
            "--no-outputs compares weights alone"
        ) from error
