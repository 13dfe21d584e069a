"""SGLang in a process of its own: a line of JSON in, a line of JSON out, until there are no more.

SGLang starts processes that import the main module again, and ends the whole process when one of
them fails; neither is for a program that only wanted to compare. The first line is
`{"engine": {...}}`, arguments of `sglang.Engine`, and is answered with its dtype and device. Each
later one holds arguments of `generate`, and is answered with a list of
`{"ids": [...], "read": [...], "drawn": [...]}`, a log-probability and a list of the most likely
tokens for each place.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Serve stdin until it ends. What SGLang prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    engine = _start(json.loads(sys.stdin.readline())["engine"])
    dtype = str(engine.tokenizer_manager.model_config.dtype).removeprefix("torch.")
    answer({"dtype": dtype, "device": engine.server_args.device})
    for line in sys.stdin:
        answer([_plain(one) for one in engine.generate(**json.loads(line))])
    engine.shutdown()


def _start(arguments: dict[str, Any]) -> Any:
    import sglang
    import torch

    if not torch.accelerator.is_available():
        arguments |= {"device": "cpu", "disable_cuda_graph": True}
    return sglang.Engine(**arguments)


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    meta = found["meta_info"]
    return {
        "ids": found["output_ids"],
        **{name: _listed(meta, key) for name, key in (("read", "input"), ("drawn", "output"))},
    }


def _listed(meta: dict[str, Any], key: str) -> list[Any]:
    """[log-probability, [[log-probability, token], ...]] of every place; of the first: null."""
    own, top = meta.get(f"{key}_token_logprobs"), meta.get(f"{key}_top_logprobs")
    return [
        [one[0], [entry[:2] for entry in entries or ()]]
        for one, entries in zip(own or (), top or (), strict=True)
    ]


if __name__ == "__main__":
    main()
