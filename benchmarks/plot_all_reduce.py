"""Draws the plots of docs/all_reduce.md from the committed results.

    python benchmarks/plot_all_reduce.py

Of each family of peers the fastest member is drawn.
"""

from __future__ import annotations

import json
from pathlib import Path

from panels import DOCS, finish, frame, panels

# From docs/, which panels puts on the path.
from measured import RESULTS  # isort: skip
from measured_parallel import OPERATORS, plot_name  # isort: skip
from result_rows import OURS, Times, grouped  # isort: skip

FAMILIES = {"FlashInfer": "flashinfer-", "NCCL": "nccl+", "symmetric memory": "symm_mem-"}


def plot(op: str, times: Times, title: str, path: Path) -> None:
    """Microseconds against tokens, one panel per hidden size."""
    widths = sorted({hidden for name, hidden, _ in times if name == op})
    figure, axes = panels(len(widths), 3.0, 3.3)
    for axis, hidden in zip(axes, widths, strict=True):
        points = sorted((t, us) for (o, h, t), us in times.items() if (o, h) == (op, hidden))
        for label, head in FAMILIES.items():
            curve = [(t, min(u for i, u in us.items() if i.startswith(head))) for t, us in points]
            axis.plot(*zip(*curve, strict=True), label=label, marker=".", linewidth=1.1)
        ours = [(t, us[OURS]) for t, us in points]
        axis.plot(
            *zip(*ours, strict=True), label="gemma-fold", marker=".", color="k", linewidth=2.2
        )
        frame(axis, hidden, [1, 16, 256, 2048], [4, 16, 64, 256])
        axis.grid(axis="y", linewidth=0.4)
    finish(figure, axes, "microseconds", title, path)


def main() -> None:
    for result in sorted(RESULTS.glob("all_reduce_h*.json")):
        data = json.loads(result.read_text())
        times = grouped(data["rows"])
        for op, title in OPERATORS.items():
            gpus = f"{data['meta']['world']} x {data['meta']['gpu']}"
            plot(op, times, f"{title}, {gpus}", DOCS / "images" / plot_name(result.name, op))


if __name__ == "__main__":
    main()
