"""Log-probabilities from a running server, over the OpenAI completions API.

`POST /v1/completions` with `echo` and `logprobs` returns the k most likely tokens at every position
of the prompt (https://platform.openai.com/docs/api-reference/completions). That is all a server
returns, so the comparison is over the top k. If the server offers it, as vLLM does with
`return_tokens_as_token_ids`, tokens are named by id, since several may share a text.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_fold.errors import HostError, UsageError

#: Most likely tokens asked for at each position; servers limit it, vLLM to 20 unless set.
TOP_K = 10
_NAMED_BY_ID = re.compile(r"token_id[:_](\d+)")
_PROBE = "The light on the"


@dataclass(frozen=True, slots=True)
class Position:
    """What a model answered for one token: its own log-probability, and the top k in its place."""

    token: str
    logprob: float
    top: Mapping[str, float]


def is_url(text: str) -> bool:
    """Whether `text` names a server."""
    return text.startswith(("http://", "https://"))


class _RefusedError(HostError):
    """The server answered, with an HTTP error."""


class Endpoint:
    """A server at a base address such as http://127.0.0.1:8000, with or without /v1."""

    def __init__(self, url: str, timeout: float) -> None:
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else base + "/v1"
        self._timeout = timeout
        self.model = self._find_model()

    def names_ids(self) -> bool:
        """Ask for a few tokens: whether they are named by id.

        Raises:
            HostError: the server gives no prompt log-probabilities.
        """
        try:
            positions = self.read(_PROBE, by_id=True)
        except _RefusedError:
            positions = self.read(_PROBE, by_id=False)
        return all(_NAMED_BY_ID.fullmatch(p.token) for p in positions)

    def read(self, prompt: str | tuple[int, ...], *, by_id: bool) -> list[Position]:
        """Log-probabilities of every token of the prompt but the first."""
        answer = self._complete(prompt, 1, echo=True, by_id=by_id)
        logprobs = self._logprobs(answer)
        count = (answer.get("usage") or {}).get("prompt_tokens")
        positions = self._positions(logprobs)
        end = count if isinstance(count, int) else len(positions) - 1
        if end < 2 or len(positions) < end:
            raise self._no_logprobs()
        return positions[1:end]

    def continue_greedily(
        self, prompt: str | tuple[int, ...], tokens: int, *, by_id: bool
    ) -> tuple[tuple[str, ...], str]:
        """The most likely continuation: tokens, and their text."""
        answer = self._complete(prompt, tokens, echo=False, by_id=by_id)
        names = tuple(map(_name, self._logprobs(answer).get("tokens") or ()))
        return names, str(answer["choices"][0].get("text", ""))

    def _complete(
        self, prompt: str | tuple[int, ...], tokens: int, *, echo: bool, by_id: bool
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": TOP_K,
        }
        if echo:
            body["echo"] = True
        if by_id:
            body["return_tokens_as_token_ids"] = True
        return self._request("/completions", body)

    def _find_model(self) -> str:
        data = self._request("/models", None).get("data")
        if not isinstance(data, list) or not data or "id" not in data[0]:
            raise HostError(
                f"{self.url} lists no model; give the address of an OpenAI-compatible server "
                "that names what it serves"
            )
        return str(data[0]["id"])

    def _logprobs(self, answer: dict[str, Any]) -> dict[str, Any]:
        choices = answer.get("choices")
        logprobs = choices[0].get("logprobs") if isinstance(choices, list) and choices else None
        if not isinstance(logprobs, dict):
            raise self._no_logprobs()
        return logprobs

    def _positions(self, logprobs: dict[str, Any]) -> list[Position]:
        columns = [logprobs.get(key) for key in ("tokens", "token_logprobs", "top_logprobs")]
        if not all(isinstance(column, list) for column in columns):
            raise self._no_logprobs()
        try:
            # The first token has no prediction before it; servers put null there.
            return [
                Position(_name(t), _float(p), _floats(top or {}))
                for t, p, top in zip(*columns, strict=True)
            ]
        except (TypeError, ValueError, AttributeError):
            raise self._no_logprobs() from None

    def _no_logprobs(self) -> HostError:
        return HostError(
            f"{self.url} gives no log-probabilities of the prompt; use a server whose "
            "/v1/completions supports echo together with logprobs"
        )

    def _request(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except TimeoutError:
            raise self._too_slow() from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise self._too_slow() from None
            raise self._unreachable(error.reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise UsageError(
                f"{self.url}{path} does not answer in JSON; "
                "give the address of an OpenAI-compatible server"
            )
        return answer

    def _refused(self, error: urllib.error.HTTPError) -> _RefusedError:
        text = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
        return _RefusedError(
            f"{self.url} refused the request (HTTP {error.code}{': ' + text if text else ''}); "
            "check the address, the server's log and OPENAI_API_KEY"
        )

    def _too_slow(self) -> HostError:
        return HostError(f"{self.url} gave no answer within {self._timeout:g} s; raise --timeout")

    def _unreachable(self, reason: object) -> HostError:
        return HostError(
            f"{self.url} cannot be reached ({reason}); start the server, or correct the address"
        )


def _name(token: object) -> str:
    """A token's name; ids are spelled one way, whichever version of a server sends them."""
    match = _NAMED_BY_ID.fullmatch(str(token))
    return f"token_id:{match[1]}" if match else str(token)


def _floats(top: Mapping[str, Any]) -> dict[str, float]:
    return {_name(token): _float(logprob) for token, logprob in top.items()}


def _float(logprob: Any) -> float:
    """NaN if there is none."""
    return math.nan if logprob is None else float(logprob)
