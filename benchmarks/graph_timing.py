"""Times calls inside CUDA graphs, several implementations in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

Graphs = dict[str, torch.cuda.CUDAGraph]


def capture(call: Callable[[int], Any], calls: int, sets: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of ``calls`` calls; their outputs stay alive so that each has its own memory."""
    for i in range(min(2, sets)):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i % sets) for i in range(calls)]
    return graph, kept


def time_interleaved(graphs: Graphs, calls: int, rounds: int) -> dict[str, float]:
    """Median microseconds of one call, the graphs replayed in turn within each round."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for timed in [False] + [True] * rounds:
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if timed:
                times[name].append(start.elapsed_time(end) * 1000.0 / calls)
    return {name: statistics.median(values) for name, values in times.items()}
