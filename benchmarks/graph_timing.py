"""Times calls inside CUDA graphs, several implementations in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[int], Any]


def capture(call: Call, calls: int, sets: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of ``calls`` calls; their outputs stay alive so that each has its own memory."""
    for i in range(min(2, sets)):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i % sets) for i in range(calls)]
    return graph, kept


def measure(
    calls: dict[str, Call],
    count: int,
    sets: int,
    rounds: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Median microseconds of one call: graphs of ``count``, replayed in turn within each round.

    Args:
        calls: by name; ``call(i)`` works on buffer set ``i``.
        count: calls in a graph.
        sets: buffer sets, which the calls go round.
        rounds: timed replays of each graph, after one that is not.
        before: runs before each replay is timed.
    """
    graphs = {name: capture(call, count, sets) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for timed in [False] + [True] * rounds:
        for name, (graph, _) in graphs.items():
            before()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if timed:
                times[name].append(start.elapsed_time(end) * 1000.0 / count)
    return {name: statistics.median(values) for name, values in times.items()}
