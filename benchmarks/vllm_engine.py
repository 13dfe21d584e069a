"""One engine of `benchmarks.vllm_decode`: starts vLLM, then answers one JSON line with another.

`python -P vllm_engine.py READ_FD WRITE_FD OPTIONS`; OPTIONS is JSON: `engine` for vllm.LLM, and
where `traces` of a profile go. Commands: {"do": "measure" or "profile", "concurrency", "input",
"output", "seed"}, {"do": "say", "batches", "output", "fresh"} and {"do": "exit"}.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

PROFILED_STEPS = 10
#: Log-probabilities that come with an output token, beside its own.
TOP = 4
#: The most tokens of a prompt that is said; the first of them are those of other prompts, too.
LONGEST, SHARED = 192, 64


class Engine:
    """vLLM, driven step by step."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(**options["engine"])
        self._traces = Path(options["traces"])
        config = self._llm.llm_engine.vllm_config
        self._vocabulary = config.model_config.get_vocab_size()
        self._started = 0
        self._said: dict[int, list[dict[int, float]]] = {}
        self.about = {
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "compilation_mode": str(config.compilation_config.mode),
            "fuse_allreduce_rms": config.compilation_config.pass_config.fuse_allreduce_rms,
        }

    def measure(self, concurrency: int, prompt: int, new: int, seed: int) -> dict[str, Any]:
        """Seconds between engine outputs that hold one token of every sequence, and in all."""
        self._add(concurrency, prompt, new, seed)
        engine, gaps, last, tokens = self._llm.llm_engine, [], None, 0
        start = time.perf_counter()
        while engine.has_unfinished_requests():
            counts = [len(output.outputs[0].token_ids) for output in engine.step()]
            now = time.perf_counter()
            tokens += sum(counts)
            full = counts == [1] * concurrency
            if full and last is not None:
                gaps.append(now - last)
            last = now if full else None
        if tokens != concurrency * new:
            raise RuntimeError(f"{tokens} tokens came back, not {concurrency * new}")
        return {"gaps": gaps, "seconds": time.perf_counter() - start, "tokens": tokens}

    def profile(self, concurrency: int, prompt: int, new: int, seed: int) -> dict[str, Any]:
        """Kernels of one decode step on rank 0: name -> [launches, microseconds]."""
        self._add(concurrency, prompt, new, seed)
        engine = self._llm.llm_engine
        while len(engine.step()) < concurrency:
            pass
        for _ in range(5):
            engine.step()
        self._llm.start_profile()
        for _ in range(PROFILED_STEPS):
            engine.step()
        self._llm.stop_profile()
        while engine.has_unfinished_requests():
            engine.step()
        return {"kernels": self._kernels()}

    def say(self, batches: list[list[int]], output: int, fresh: bool) -> dict[str, Any]:
        """Answer numbered prompts, batch by batch, and compare with the first answer to each.

        `fresh`: nothing is in the prefix cache when a batch starts.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=output, ignore_eos=True, detokenize=False, logprobs=TOP
        )
        found = Counter[str]()
        largest = 0.0
        for batch in batches:
            if fresh:
                self._llm.reset_prefix_cache()
            prompts: list[Any] = [{"prompt_token_ids": self._prompt(n)} for n in batch]
            answers = self._llm.generate(prompts, params, use_tqdm=False)
            for number, answer in zip(batch, answers, strict=True):
                said = _logprobs(answer.outputs[0])
                for one, other in zip(said, self._said.setdefault(number, said), strict=True):
                    pairs = [(value, other.get(token)) for token, value in one.items()]
                    found["tokens"] += 1
                    found["logprobs"] += len(pairs)
                    found["tokens_differing"] += next(iter(one)) != next(iter(other))
                    found["logprobs_differing"] += sum(a != b for a, b in pairs)
                    largest = max([largest, *(abs(a - b) for a, b in pairs if b is not None)])
        distinct = {next(iter(one)) for said in self._said.values() for one in said}
        return {**found, "largest": largest, "distinct_tokens": len(distinct)}

    def _prompt(self, number: int) -> list[int]:
        """Prompts of many lengths; every four begin alike."""
        begin, choose = random.Random(number // 4), random.Random(1000 + number)
        ids = [begin.randrange(3, self._vocabulary) for _ in range(SHARED)]
        ids += [choose.randrange(3, self._vocabulary) for _ in range(LONGEST - SHARED)]
        return ids[: choose.randrange(SHARED // 4, LONGEST)]

    def _add(self, concurrency: int, prompt: int, new: int, seed: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        choose = random.Random(seed)
        params = SamplingParams(
            temperature=0,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        for _ in range(concurrency):
            ids = [choose.randrange(3, self._vocabulary) for _ in range(prompt)]
            self._llm.llm_engine.add_request(
                f"request-{self._started}", {"prompt_token_ids": ids}, params
            )
            self._started += 1

    def _kernels(self) -> dict[str, list[float]]:
        path = _newest_trace(self._traces)
        packed = path.read_bytes()
        trace = json.loads(gzip.decompress(packed) if path.suffix == ".gz" else packed)
        launches: Counter[str] = Counter()
        spent: Counter[str] = Counter()
        for event in trace["traceEvents"]:
            if event.get("cat") == "kernel":
                launches[event["name"]] += 1
                spent[event["name"]] += event["dur"]
        return {
            name: [launches[name] / PROFILED_STEPS, round(total / PROFILED_STEPS, 2)]
            for name, total in spent.most_common()
        }


def _logprobs(output: Any) -> list[dict[int, float]]:
    """Of each token of an answer: its log-probability, first, and those of the likeliest others."""
    return [
        {token: top[token].logprob, **{other: entry.logprob for other, entry in top.items()}}
        for token, top in zip(output.token_ids, output.logprobs, strict=True)
    ]


def _newest_trace(folder: Path) -> Path:
    """The trace of rank 0, which may be written a moment after profiling stopped."""
    for _ in range(600):
        found = [p for p in folder.rglob("*.json*") if "async_llm" not in p.name]
        rank0 = [p for p in found if "rank0" in p.name or "tp0" in p.name] or found
        if rank0:
            newest = max(rank0, key=lambda p: p.stat().st_mtime)
            size = newest.stat().st_size
            time.sleep(1)
            if size and newest.stat().st_size == size:
                return newest
        time.sleep(0.1)
    raise RuntimeError(f"no trace was written to {folder}")


def answer(engine: Engine, command: dict[str, Any]) -> dict[str, Any]:
    """What a command other than "exit" gives."""
    if command["do"] == "say":
        return engine.say(command["batches"], command["output"], command["fresh"])
    work = engine.measure if command["do"] == "measure" else engine.profile
    return work(command["concurrency"], command["input"], command["output"], command["seed"])


def main() -> None:
    read_fd, write_fd, options = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    with open(read_fd) as commands, open(write_fd, "w", buffering=1) as answers:
        engine = Engine(options)
        answers.write(json.dumps(engine.about) + "\n")
        for line in commands:
            command = json.loads(line)
            if command["do"] == "exit":
                break
            answers.write(json.dumps(answer(engine, command)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the engine's processes go with this one's process group


if __name__ == "__main__":
    main()
