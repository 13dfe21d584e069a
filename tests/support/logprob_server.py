"""A small OpenAI-compatible server around a real model: completions with echo and logprobs.

It answers as vLLM does: ids or text as the prompt, the top k at every position of it, tokens named
by id on request.

    with LogprobServer(model, tokenizer) as server:
        diff(server.url, ...)
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@dataclass
class Faults:
    """What the server does wrong."""

    names_ids: bool = True  # knows return_tokens_as_token_ids
    refuses_unknown: bool = False  # answers 400 to a field it does not know
    logprobs: bool = True
    echo: bool = True
    models: bool = True
    json: bool = True
    status: int = 200
    delay: float = 0.0
    #: Changes the `logprobs` of an answer in place: tokens, token_logprobs, top_logprobs.
    edit: Callable[[dict[str, Any]], None] | None = None


class LogprobServer:
    """See the module's docstring."""

    def __init__(self, model: Any, tokenizer: Any, **faults: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.faults = Faults(**faults)
        self.requests: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LogprobServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            ids = [self.tokenizer.bos_token_id, *self.tokenizer.encode(prompt)]
        else:
            ids = list(prompt)
        with self._lock, torch.inference_mode():
            everything = list(ids)
            for _ in range(body["max_tokens"]):
                logits = self.model(input_ids=torch.tensor([everything])).logits[0]
                everything.append(int(logits[-1].argmax()))
            logits = self.model(input_ids=torch.tensor([everything])).logits[0]
        first = 0 if body.get("echo") and self.faults.echo else len(ids)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        choice["text"] = self.tokenizer.decode(everything[first:])
        if self.faults.logprobs:
            by_id = bool(body.get("return_tokens_as_token_ids")) and self.faults.names_ids
            table = logits.double().log_softmax(-1)
            choice["logprobs"] = self._logprobs(everything, first, table, body["logprobs"], by_id)
            if self.faults.edit and body.get("echo"):
                self.faults.edit(choice["logprobs"])
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    def _logprobs(
        self, ids: list[int], first: int, table: torch.Tensor, k: int, by_id: bool
    ) -> dict[str, Any]:
        def name(token: int) -> str:
            return f"token_id:{token}" if by_id else str(self.tokenizer.decode([token]))

        own: list[float | None] = []
        top: list[dict[str, float] | None] = []
        for at in range(first, len(ids)):
            if at == 0:
                own.append(None)
                top.append(None)
                continue
            row = table[at - 1]
            best = row.topk(min(k, len(row)))
            own.append(float(row[ids[at]]))
            listed = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            top.append({name(token): value for token, value in listed})
            top[-1][name(ids[at])] = float(row[ids[at]])  # type: ignore[index]
        tokens = [name(token) for token in ids[first:]]
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": top}


class _Handler(BaseHTTPRequestHandler):
    owner: LogprobServer

    def do_GET(self) -> None:
        models = [{"id": "tiny", "object": "model"}] if self.owner.faults.models else []
        self._answer(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        faults = self.owner.faults
        self.owner.requests.append(body)
        time.sleep(faults.delay)
        if faults.status != 200:
            self._answer(faults.status, {"error": {"message": "the engine has died"}})
        elif faults.refuses_unknown and "return_tokens_as_token_ids" in body:
            self._answer(400, {"error": {"message": "unknown field"}})
        else:
            self._answer(200, self.owner.complete(body))

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        raw = json.dumps(value).encode() if self.owner.faults.json else b"<html>"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        with suppress(BrokenPipeError):  # the client may have lost its patience
            self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """Tests read no log."""
