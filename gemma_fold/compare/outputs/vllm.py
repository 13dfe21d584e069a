"""Side A or B run by vLLM, offline: the top k at every position, as its server would give them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gemma_fold.compare.outputs.server import TOP_K, Position
from gemma_fold.compare.outputs.tokens import Tokens
from gemma_fold.compare.sides import Side
from gemma_fold.engines.serve import check_plugin
from gemma_fold.errors import GemmaFoldError, UnsupportedModelError, first_line

Text = str | tuple[int, ...]
Decoded = tuple[list[list[Position]], list[list[Position]]]  # the same tokens one by one, at once
#: Tokens of a text that are decoded on a CPU to find the noise floor; on a GPU half of it is.
_CPU_DECODED = 32


@dataclass(frozen=True, slots=True)
class VllmSide:
    """A checkpoint that vLLM runs."""

    side: Side
    eager: bool = False  # without torch.compile and CUDA graphs, even on a GPU


def import_vllm() -> None:
    """Check that vLLM is there; its log stays off stdout, its processes start afresh."""
    check_plugin("vllm")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # A fork of this process, which has asked about GPUs, could not use any.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


class _Engine:
    """A source of :mod:`gemma_fold.compare.outputs.top_k`."""

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

    def read_decoded(self, texts: Sequence[Text]) -> Decoded:
        """The second halves of the texts as the model continues the first, drawn by its own odds.

        As they were decoded, one token of every text at a time, and as they are read at once.
        """
        starts = [text[: len(text) // 2] for text in texts if not isinstance(text, str)]
        tokens = min(len(text) - len(text) // 2 for text in texts)
        tokens = min(tokens, _CPU_DECODED) if not compiles() else tokens
        odds = {"temperature": 1.0, "seed": 0, "ignore_eos": True, "logprobs": TOP_K}
        answers = self._generate(starts, max_tokens=tokens, **odds)
        drawn = [tuple(answer.outputs[0].token_ids) for answer in answers]
        decoded = [
            list(map(self._position, ids, answer.outputs[0].logprobs))
            for ids, answer in zip(drawn, answers, strict=True)
        ]
        whole = [start + ids for start, ids in zip(starts, drawn, strict=True)]
        read = [self.read(text) for text in whole]
        return decoded, [row[len(start) - 1 :] for row, start in zip(read, starts, strict=True)]

    def continue_greedily(self, text: Text, tokens: int) -> tuple[tuple[str, ...], str]:
        ids = tuple(self._generate([text], max_tokens=tokens)[0].outputs[0].token_ids)
        return tuple(map(self._name, ids)), self._tokens.text(ids)

    def _generate(self, texts: Sequence[Text], **params: Any) -> Any:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(text)} for text in texts]
        settings = SamplingParams(**{"temperature": 0, "detokenize": False, **params})
        return self._llm.generate(prompts, settings, use_tqdm=False)

    def _position(self, token: Any, listed: dict[int, Any]) -> Position:
        top = {i: entry.logprob for i, entry in listed.items() if entry.rank <= TOP_K}
        named = {self._name(i): p for i, p in top.items()}
        return Position(self._name(token), listed[token].logprob, named)


@contextmanager
def running(
    side: VllmSide, tokens: Tokens, dtype: str, new_tokens: int, name: Callable[[int], str]
) -> Iterator[_Engine]:
    """Start vLLM on the checkpoint, and end it.

    `name` spells a token.

    Raises:
        UnsupportedModelError: vLLM does not run the checkpoint.
    """
    windows = [len(window) + 1 for window in tokens.windows]
    prompts = [len(prompt.ids) + new_tokens for prompt in tokens.prompts]
    llm = _start(side, dtype, max(windows + prompts))
    try:
        yield _Engine(llm, name, tokens)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def compiles() -> bool:
    """Whether vLLM compiles what it runs here. On a CPU that would take longer than the run."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def _start(side: VllmSide, dtype: str, longest: int) -> Any:
    from vllm import LLM

    try:
        return LLM(
            str(side.side.root),
            dtype=dtype,
            max_model_len=longest,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
            enforce_eager=side.eager or not compiles(),
        )
    except GemmaFoldError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"vLLM does not run {side.side.name} ({first_line(error)}); its log is above, and "
            "--no-outputs compares weights alone"
        ) from error
