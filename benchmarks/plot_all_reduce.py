"""Draws the plots of docs/all_reduce.md from the committed results.

python benchmarks/plot_all_reduce.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "gemma-fold"  # the same plot gives the same bytes
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

DOCS = Path(__file__).resolve().parent.parent / "docs"
sys.path.insert(0, str(DOCS))

from measured_parallel import (  # type: ignore[import-not-found]  # noqa: E402
    OPERATORS,
    OURS,
    RESULTS,
    grouped,
    plot_name,
)

#: Peers by family; of each the fastest member is drawn.
FAMILIES = {"FlashInfer": "flashinfer-", "NCCL": "nccl+", "symmetric memory": "symm_mem-"}
Times = dict[tuple[str, int, int], dict[str, float]]


def plot(op: str, times: Times, title: str, path: Path) -> None:
    """Microseconds against tokens, one panel per hidden size."""
    widths = sorted({hidden for name, hidden, _ in times if name == op})
    figure, axes = plt.subplots(
        1, len(widths), figsize=(3.0 * len(widths), 3.3), sharey=True, squeeze=False
    )
    for axis, hidden in zip(axes[0], widths, strict=True):
        points = sorted((t, us) for (o, h, t), us in times.items() if (o, h) == (op, hidden))
        for label, head in FAMILIES.items():
            curve = [(t, min(u for i, u in us.items() if i.startswith(head))) for t, us in points]
            axis.plot(*zip(*curve, strict=True), label=label, marker=".", linewidth=1.1)
        ours = [(t, us[OURS]) for t, us in points]
        axis.plot(
            *zip(*ours, strict=True), label="gemma-fold", marker=".", color="k", linewidth=2.2
        )
        axis.set_xscale("log", base=4)
        axis.set_yscale("log", base=2)
        axis.set_xticks([1, 16, 256, 2048], ["1", "16", "256", "2048"])
        axis.set_yticks([4, 16, 64, 256], ["4", "16", "64", "256"])
        axis.minorticks_off()
        axis.grid(axis="y", linewidth=0.4)
        axis.set_title(f"H {hidden}", fontsize=9)
        axis.set_xlabel("tokens", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0][0].set_ylabel("microseconds", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    for result in sorted(RESULTS.glob("all_reduce_h*.json")):
        data = json.loads(result.read_text())
        times = grouped(data["rows"])
        for op, title in OPERATORS.items():
            gpus = f"{data['meta']['world']} x {data['meta']['gpu']}"
            plot(op, times, f"{title}, {gpus}", DOCS / "images" / plot_name(result.name, op))


if __name__ == "__main__":
    main()
