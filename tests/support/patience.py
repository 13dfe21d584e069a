"""How long tests wait on this machine: time-outs of a quiet machine, stretched on a slow one."""

from __future__ import annotations

import math
import os
import time

import torch

#: What the fixed work below takes on a quiet core of a server of 2021.
_REFERENCE_SECONDS = 0.36
#: Other processes come and go, so a measurement is good for so long.
_AGAIN_SECONDS = 300.0
_measured = (-math.inf, 1.0)


def seconds(quiet: float) -> float:
    """`quiet` seconds, times how much slower than the reference this machine has been."""
    return quiet * slowness()


def slowness() -> float:
    """At least 1. Wall time counts, so a busy machine is a slow one; the worst so far holds."""
    global _measured
    when, worst = _measured
    if time.monotonic() - when > _AGAIN_SECONDS:
        worst = max(worst, _work_seconds() / _REFERENCE_SECONDS)
        _measured = (time.monotonic(), worst)
    return worst


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def _work_seconds() -> float:
    """The time that a fixed amount of work takes, half in Python and half in torch."""
    start = time.perf_counter()
    total = 0
    for number in range(8_000_000):
        total += number & 7
    product = torch.ones(512, 512)
    for _ in range(80):
        product = torch.mm(product, product) * 1e-3
    return time.perf_counter() - start
