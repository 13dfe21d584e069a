"""Load on an SGLang server: streamed requests of random tokens, so many at a time, and their times.

The kind of load that SGLang's `bench_serving` makes of its random data set, without a tokenizer.
"""

from __future__ import annotations

import json
import random
import statistics
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.result import Values

MEASURES = {
    "tokens_per_s": "tokens a second",
    "ms_per_token": "milliseconds a token after the first, of a request",
    "gap_ms_p99": "milliseconds between tokens",
    "first_token_ms": "milliseconds to the first token",
}


@dataclass(frozen=True)
class Timing:
    """One request, in seconds: until its first token, and between the arrivals after that."""

    first: float
    gaps: tuple[float, ...]
    tokens: int


def request(url: str, prompt: list[int], tokens: int) -> Timing:
    """Generate exactly `tokens` tokens after `prompt`."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        "stream": True,
    }
    data, header = json.dumps(body).encode(), {"Content-Type": "application/json"}
    start = time.perf_counter()
    arrivals, produced = [], 0
    with urllib.request.urlopen(
        urllib.request.Request(url + "/generate", data, header), timeout=600
    ) as answer:
        for line in answer:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                arrivals.append(time.perf_counter())
                produced = json.loads(line[5:])["meta_info"]["completion_tokens"]
    if produced != tokens:
        raise RuntimeError(f"the server made {produced} of {tokens} tokens")
    gaps = tuple(after - before for before, after in pairwise(arrivals))
    return Timing(arrivals[0] - start, gaps, produced)


def measure(
    url: str, *, concurrency: int, requests: int, length: int, tokens: int, vocab: int, seed: int
) -> Values:
    """`requests` prompts of `length` random tokens, `concurrency` at a time, summed up."""
    generator = random.Random(seed)
    prompts = [[generator.randrange(3, vocab) for _ in range(length)] for _ in range(requests)]
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        timings = list(pool.map(lambda prompt: request(url, prompt, tokens), prompts))
    wall = time.perf_counter() - start
    per_token = [sum(timing.gaps) / (timing.tokens - 1) for timing in timings]
    gaps = sorted(gap for timing in timings for gap in timing.gaps)
    return {
        "tokens_per_s": sum(timing.tokens for timing in timings) / wall,
        "ms_per_token": 1000 * statistics.median(per_token),
        "gap_ms_p99": 1000 * gaps[int(0.99 * (len(gaps) - 1))],
        "first_token_ms": 1000 * statistics.median(timing.first for timing in timings),
        "requests": requests,
    }
