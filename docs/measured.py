"""Tables of docs/measurements.md, from the committed results."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _provenance(meta: dict[str, Any]) -> str:
    names = ("torch", "transformers", "triton", "python")
    versions = ", ".join(f"{name} {meta[name]}" for name in names if name in meta)
    note = f" {meta['note']}" if "note" in meta else ""
    return f"{meta['device']}, {versions}; {meta['date']}, commit `{meta['commit'][:12]}`.{note}"


def decode() -> str:
    """Milliseconds a token, stock against folded."""
    parts = []
    for name in ("transformers_decode_h200.json", "transformers_decode_h100.json"):
        found = _read(name)
        rows = (
            (r["mode"], r["batch"], r["variant"], f"{r['ms_per_token']:.2f}", f"{r['speedup']:.2f}")
            for r in found["rows"]
        )
        header = ("mode", "batch", "variant", "ms per token", "speed against stock")
        parts.append(f"{_provenance(found['meta'])}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def gpu_diff() -> str:
    """Outputs of the real 270M, by GPU and compute dtype."""
    runs = itertools.product(("h200", "h100"), ("bfloat16", "float32"))
    return _diffs((f"diff_270m_{gpu}_{dtype}.json", dtype) for gpu, dtype in runs)


def vllm_diff() -> str:
    """Outputs of the real 270M, by vLLM."""
    return _diffs([("diff_270m_vllm_h100_bfloat16.json", "bfloat16")])


def _diffs(results: Iterable[tuple[str, str]]) -> str:
    rows = []
    for name, dtype in results:
        found = _read(name)
        stats, floor = found["outputs"]["stats"], found["outputs"]["floor"]
        env = found["environment"]
        engine = f"vllm {env['vllm']}, " if "vllm" in env else ""
        rows.append(
            (
                f"{env['gpu']}, {engine}torch {env['torch']}, {env['date'].split()[0]}",
                dtype,
                f"{stats['scored']:,}",
                f"{stats['kl_ab']['mean']:.3g}",
                f"{floor['kl_ab']['mean']:.3g}",
                found["outputs"]["floor_how"],
                f"{stats['same_top']:.2%}",
                f"{stats['perplexity_a']:.4f}, {stats['perplexity_b']:.4f}",
            )
        )
    header = (
        *("", "compute", "positions", "mean KL", "noise floor", "its measurement"),
        *("same top token", "perplexity"),
    )
    return table(header, rows)


def gpu_floor() -> str:
    """Mean KL of the random-weight model, folded and of the original to itself."""
    header = ("", "positions", "folded, one by one", "folded, in a batch", "original: noise floor")
    names = ("folded_mean_kl", "folded_batched_mean_kl", "noise_floor_mean_kl")
    rows = []
    for result in ("transformers_decode_h200.json", "transformers_decode_h100.json"):
        found = _read(result)
        (logits,) = found["logits"]
        values = (f"{logits[name]:.3g}" for name in names)
        rows.append((found["meta"]["device"], logits["positions"], *values))
    return table(header, rows)


def convert() -> str:
    """Seconds and memory of convert and cp, machine by machine."""
    return "\n\n".join(map(_converted, ("convert.json", "convert_16_cores.json")))


def _converted(name: str) -> str:
    found = _read(name)
    meta = found["meta"]
    header = ("case", "command", "seconds", "against cp", "peak memory, MB", "moved by", "commit")
    machine = (
        f"{meta['cpu']}, {meta['cores']} cores, {meta['memory_gb']} GB, kernel {meta['kernel']}, "
        f"python {meta['python']}, {meta['cp']}. Seconds are medians."
    )
    return f"{machine}\n\n{table(header, map(_convert_row, found['rows']))}"


def _convert_row(row: dict[str, Any]) -> Sequence[object]:
    ratio = next((v for k, v in row.items() if k.startswith("ratio_to_")), None)
    moved = ", ".join(f"{k} {v / 1e9:.1f} GB" for k, v in row.get("copied", {}).items())
    return (
        row["case"],
        row["tool"],
        row["median_seconds"],
        "" if ratio is None else f"{ratio:.2f}",
        row["peak_rss_mb"],
        moved,
        f"`{row['commit']}`",
    )
