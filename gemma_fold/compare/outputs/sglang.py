"""SGLang as a backend, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any

from gemma_fold.compare.outputs.backend import (
    Answer,
    EngineSide,
    Ids,
    Listed,
    does_not_run,
)
from gemma_fold.compare.outputs.server import TOP_K
from gemma_fold.engines.serve import check_plugin
from gemma_fold.errors import first_line

_WORKER = "gemma_fold.compare.outputs.sglang_worker"
#: A line that ends a traceback, and what it says.
_ERROR = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: (.*))?$")
_SECONDS_TO_END = 60
_RESERVED = 8  # tokens of a context that SGLang keeps to itself
#: That may make a context longer than the model takes, but no text that is read.
_LONGER_CONTEXT = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"


def prepare() -> None:
    """Check that SGLang is there, and loads gemma-fold."""
    check_plugin("sglang")


def start(side: EngineSide, dtype: str, longest: int, together: int) -> _Sglang:
    """Start SGLang on the checkpoint.

    Raises:
        UnsupportedModelError: SGLang does not run it.
    """
    backend = _Sglang(side)
    try:
        backend.load(dtype, longest, together)
    except BaseException:
        backend.close()
        raise
    return backend


class _Sglang:
    """A backend: the process, which is asked in lines of JSON, and what it writes to stderr."""

    dtype = device = ""

    def __init__(self, side: EngineSide) -> None:
        self._side = side
        # A session, so that all the processes it starts can be ended with it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            env={**os.environ, _LONGER_CONTEXT: "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self._process.stderr is not None
        self._log = _Log(self._process.stderr)

    def load(self, dtype: str, longest: int, together: int) -> None:
        """Have the model loaded."""
        engine = {
            "model_path": str(self._side.side.root),
            "dtype": dtype,
            "skip_tokenizer_init": True,
            "context_length": longest + _RESERVED,
            "max_total_tokens": together + 2 * longest,  # room for pages that are not full
            "disable_radix_cache": True,
            "disable_cuda_graph": self._side.eager,
            "grammar_backend": "none",
            "random_seed": 0,
            "log_level": "warning",
        }
        started = self._ask({"engine": engine})
        self.dtype, self.device = started["dtype"], started["device"]

    def continue_all(
        self, texts: Sequence[Ids], tokens: int, *, reads: bool = False, draws: bool = False
    ) -> list[Answer]:
        asked: dict[str, Any] = {
            "input_ids": [list(text) for text in texts],
            "sampling_params": {
                "max_new_tokens": tokens,
                "temperature": 1.0 if draws else 0.0,
                "ignore_eos": draws,
            },
        }
        if reads or draws:
            asked |= {"return_logprob": True, "top_logprobs_num": TOP_K}
        if reads:
            asked["logprob_start_len"] = 0
        return [
            Answer(
                tuple(one["ids"]),
                list(map(_listed, one["read"][1:])) if reads else (),
                list(map(_listed, one["drawn"])) if draws else (),
            )
            for one in self._ask(asked)
        ]

    def close(self) -> None:
        """End every process of it: SGLang, too, ends its own this way."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.join(_SECONDS_TO_END)  # all who hold its other end, and memory, have ended then

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self.close()
        reason = self._log.error or f"its process ended with {self._process.returncode}"
        raise does_not_run("SGLang", self._side, reason)


class _Log(threading.Thread):
    """Passes on what SGLang writes.

    Attributes:
        error: what the first traceback in it says, which others follow from.
    """

    def __init__(self, lines: IO[str]) -> None:
        super().__init__(daemon=True)
        self._lines = lines
        self.error = ""
        self.start()

    def run(self) -> None:
        for line in self._lines:
            sys.stderr.write(line)
            found = _ERROR.match(line)
            if found and not self.error:
                self.error = first_line(Exception(found[1] or line))


def _listed(one: Any) -> Listed:
    logprob, top = one
    return Listed(logprob, {token: p for p, token in top})
