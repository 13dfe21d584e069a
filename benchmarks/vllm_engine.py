"""One engine of `benchmarks.vllm_decode`: starts vLLM, then answers one JSON line with another.

`python -P vllm_engine.py READ_FD WRITE_FD OPTIONS`; OPTIONS is JSON: `engine` for vllm.LLM, and
where `traces` of a profile go. Commands: {"do": "measure" or "profile", "concurrency", "input",
"output", "seed"} and {"do": "exit"}.
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


class Engine:
    """vLLM, driven step by step."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(**options["engine"])
        self._traces = Path(options["traces"])
        config = self._llm.llm_engine.vllm_config
        self._vocabulary = config.model_config.get_vocab_size()
        self._started = 0
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


def main() -> None:
    read_fd, write_fd, options = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    with open(read_fd) as commands, open(write_fd, "w", buffering=1) as answers:
        engine = Engine(options)
        answers.write(json.dumps(engine.about) + "\n")
        for line in commands:
            command = json.loads(line)
            if command["do"] == "exit":
                break
            work = engine.measure if command["do"] == "measure" else engine.profile
            found = work(
                command["concurrency"], command["input"], command["output"], command["seed"]
            )
            answers.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the engine's processes go with this one's process group


if __name__ == "__main__":
    main()
