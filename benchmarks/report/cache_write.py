"""docs/benchmarks.md: q and k norm, rotary embedding and the write of the KV cache."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.report.frames import results, wide
from benchmarks.report.words import provenance, table
from benchmarks.result import COPY, OURS, Result

#: vLLM's own operators one by one, what its compiler makes, and its fused kernel.
PEERS = {
    "vllm": "vLLM's operators",
    "torch.compile+vllm": "Inductor, vLLM's write",
    "vllm fused": "vLLM's fused kernel",
}
SHOWN = (1, 8, 64, 1024, 16384)


def cache_write() -> str:
    """For each run, microseconds at some counts of tokens."""
    return "\n\n".join(part for result in results("cache_write") for part in _run(result))


def _run(result: Result) -> Iterator[str]:
    times = wide(result, "us").reset_index()
    header = ("model", "cache", "tokens", "ours", *PEERS.values(), "ours / best", "of copy")
    shown = times[times["tokens"].isin(SHOWN)]
    yield provenance(result)
    yield table(header, (_row(at) for _, at in shown.iterrows()))


def _row(at: dict[str, float]) -> tuple[object, ...]:
    others = [at[name] for name in PEERS]
    return (
        *(at["model"], at["cache"], at["tokens"], f"{at[OURS]:.2f}"),
        *(f"{us:.2f}" for us in others),
        *(f"{at[OURS] / min(others):.2f}", f"{at[COPY] / at[OURS]:.0%}"),
    )
