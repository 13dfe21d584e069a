"""Plots of a row of panels, one for each hidden size, against tokens on a logarithmic axis."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "gemma-fold"  # the same plot gives the same bytes
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

DOCS = Path(__file__).resolve().parent.parent / "docs"
sys.path.insert(0, str(DOCS))  # result_rows and the like, which the documents' tables use too


def panels(count: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure, and its axes; sizes in inches, `width` of one panel."""
    figure, axes = plt.subplots(
        1, count, figsize=(width * count, height), sharey=True, squeeze=False
    )
    return figure, axes[0]


def frame(axis: Any, hidden: int, tokens: list[int], values: list[float]) -> None:
    """Scales, ticks at `tokens` and `values`, and a title; after the curves are drawn."""
    axis.set_xscale("log", base=4)
    axis.set_yscale("log", base=2)
    axis.set_xticks(tokens, map(str, tokens))
    axis.set_yticks(values, map(str, values))
    axis.minorticks_off()
    axis.set_title(f"H {hidden}", fontsize=9)
    axis.set_xlabel("tokens", fontsize=8)
    axis.tick_params(labelsize=7)


def finish(figure: Any, axes: Any, unit: str, title: str, path: Path) -> None:
    """Label and save the figure."""
    axes[0].set_ylabel(unit, fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
