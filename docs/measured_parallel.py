"""Tables of docs/all_reduce.md, docs/vllm.md and docs/sglang.md, from the committed results."""

from __future__ import annotations

import ast
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from measured import RESULTS, table
from result_rows import OURS, Times, geometric_mean, grouped, peers_of, run_of

OPERATORS = {
    "all_reduce_add_rms_norm": "All-reduce, residual add, norm",
    "all_reduce_rms_norm_add_rms_norm": "All-reduce, Gemma's sandwich",
}
#: Kinds of work in a decode step, by what their kernels' names hold; the first that fits counts.
KINDS = {
    "all-reduce with what is fused into it": ("allreduce", "one_shot", "two_shot"),
    "matrix products": ("nvjet", "splitK", "gemm"),
    "attention and its cache": ("flash", "reshape_and_cache"),
}
#: What is told of a served run, by its name in the result.
SERVED = {
    "output_tokens_per_s": "tokens per second",
    "per_token_ms": "ms per token",
    "gap_p99_ms": "99th percentile between tokens, ms",
    "first_token_ms": "ms to the first token",
}
REST = "norms, activations, rotary embedding and the rest"


def _results(pattern: str) -> Iterator[dict[str, Any]]:
    """The committed results of such names, in their order."""
    for path in sorted(RESULTS.glob(pattern)):
        yield json.loads(path.read_text())


def all_reduce() -> str:
    """Every committed run: a summary, then microseconds of ours and of the best peer."""
    return "\n\n".join(
        part for path in sorted(RESULTS.glob("all_reduce_h*.json")) for part in _chapter(path.name)
    )


def _chapter(name: str) -> Iterator[str]:
    data = json.loads((RESULTS / name).read_text())
    meta = data["meta"]
    yield (
        f"### {meta['world']} x {meta['gpu']}\n\ntorch {meta['torch']}, triton {meta['triton']}, "
        f"{peers_of(meta)}; {run_of(meta)}"
    )
    times = grouped(data["rows"])
    yield (
        table(("", "tokens", "points", "geometric mean", "worst", "at"), _summary(times))
        + "\n\nOur time over the best peer's at each point."
    )
    for op, title in OPERATORS.items():
        yield f"![{title}](images/{plot_name(name, op)})"
        widths = sorted({hidden for o, hidden, _ in times if o == op})
        tokens = sorted({t for o, _, t in times if o == op})
        header = ("tokens", *(f"H {hidden}: ours, best peer" for hidden in widths))
        rows = [[t, *(_cell(times[op, hidden, t]) for hidden in widths)] for t in tokens]
        yield f"{title}, microseconds:\n\n{table(header, rows)}"
    portable = grouped([*data["rows"], *data["with_ours"]])
    ratios = [
        found["gemma_fold-portable"] / found[OURS]
        for found in portable.values()
        if "gemma_fold-portable" in found
    ]
    yield (
        f"The portable Triton path took {min(ratios):.2f} to {max(ratios):.2f} times the time of "
        f"the default one (geometric mean {geometric_mean(ratios):.2f})."
    )


def plot_name(result: str, op: str) -> str:
    """File name of the plot of an operator in a result file."""
    return f"{result.removesuffix('.json')}_{op}.svg"


def best_peer(times: dict[str, float]) -> tuple[float, str]:
    """The fastest implementation that is not ours, and its name."""
    return min((us, impl) for impl, us in times.items() if impl != OURS)


def _cell(times: dict[str, float]) -> str:
    us, impl = best_peer(times)
    return f"**{times[OURS]:.2f}**, {us:.2f} ({impl})"


def _summary(times: Times) -> Iterator[tuple[str, ...]]:
    for op, title in OPERATORS.items():
        for label, small in (("up to 64", True), ("more", False)):
            ratios = [
                (found[OURS] / best_peer(found)[0], f"H {hidden}, {tokens} tokens")
                for (o, hidden, tokens), found in times.items()
                if o == op and (tokens <= 64) == small
            ]
            worst, where = max(ratios)
            mean = geometric_mean([ratio for ratio, _ in ratios])
            yield title, label, str(len(ratios)), f"{mean:.2f}", f"{worst:.2f}", where


def stress() -> str:
    """What the long runs found."""
    lines = []
    for found in _results("all_reduce_stress_*.json"):
        lines.append(
            f"{found['world']} x {found['gpu']}, commit `{found['commit'][:12]}`: "
            f"{found['calls']:,} calls, {found['different']} results differ, {found['seconds']} s."
        )
    return "\n".join(lines)


def two_shot() -> str:
    """Ours alone, with the first version of two-shot and with the present one."""
    first, now = (
        json.loads((RESULTS / f"all_reduce_{name}h100x4.json").read_text())
        for name in ("first_two_shot_", "")
    )
    before, after = grouped(first["rows"]), grouped(now["rows"])
    tokens = sorted({t for _, _, t in before if t >= 64})
    header = ("", "H", *(f"{t} tokens: first, now" for t in tokens))
    rows = [
        (title, hidden, *(f"{before[at][OURS]:.1f}, {after[at][OURS]:.1f}" for at in places))
        for op, title in OPERATORS.items()
        for hidden in sorted({hidden for _, hidden, _ in before})
        for places in ([(op, hidden, t) for t in tokens],)
    ]
    return f"The first: {run_of(first['meta'])}\n\n{table(header, rows)}"


def sanitizer() -> str:
    """What compute-sanitizer found in the kernels of all ranks."""
    lines = []
    for data in _results("all_reduce_sanitizer_*.json"):
        meta = data["meta"]
        lines.append(f"{meta['world']} x {meta['gpu']}, torch {meta['torch']}; {run_of(meta)}\n")
        lines += [
            f"* {run['tool']}, {run['calls']} calls on each rank: {sorted(set(run['summary']))[0]}"
            for run in data["runs"]
        ]
    return "\n".join(lines)


def protocols() -> str:
    """One-shot and two-shot, in turn, for each row length."""
    parts = []
    for data in _results("all_reduce_protocols_*.json"):
        meta, times = data["meta"], grouped(data["rows"])
        widths = sorted({hidden for _, hidden, _ in times})
        tokens = sorted({t for _, _, t in times})
        header = ("tokens", *(f"H {hidden}: one-shot, two-shot" for hidden in widths))
        parts.append(f"{meta['world']} x {meta['gpu']}, torch {meta['torch']}; {run_of(meta)}")
        for op, title in OPERATORS.items():
            rows = [[t, *(_both(times[op, hidden, t]) for hidden in widths)] for t in tokens]
            parts.append(f"{title}:\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def _both(times: dict[str, float]) -> str:
    """Microseconds of both protocols, the faster one bold."""
    one, two = times["one-shot"], times["two-shot"]
    return f"**{one:.2f}**, {two:.2f}" if one <= two else f"{one:.2f}, **{two:.2f}**"


def sglang() -> str:
    """SGLang's server as it comes, and with native mode."""
    parts = []
    for data in _results("sglang_*.json"):
        meta, header = data["meta"], ("requests at once", "", "stock", "native", "native / stock")
        parts.append(
            f"{meta['world']} x {meta['gpu']}, {meta['model']} with random weights, "
            f"{meta['input']}/{meta['output']} tokens in/out, torch {meta['torch']}, "
            f"{peers_of(meta)}; {run_of(meta)}\n\n{table(header, _served(data['rows']))}"
        )
    return "\n\n".join(parts)


def _served(rows: list[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    """Medians over the repeats."""
    for concurrency in sorted({row["concurrency"] for row in rows}):
        for metric, title in SERVED.items():
            stock, ours = (
                statistics.median(
                    row[metric]
                    for row in rows
                    if (row["concurrency"], row["impl"]) == (concurrency, impl)
                )
                for impl in ("stock", OURS)
            )
            yield concurrency, title, f"{stock:.1f}", f"{ours:.1f}", f"{ours / stock:.3f}"


def vllm() -> str:
    """Time per output token, stock against native mode."""
    return "\n\n".join(part for data in _results("vllm_*.json") for part in _vllm_run(data))


def headline() -> str:
    """How much less time an output token takes, by engine and model: one line for each run."""
    rows = []
    for data in (*_results("sglang_h*.json"), *_results("vllm_h*.json")):
        meta = data["meta"]
        times: dict[tuple[int, int], dict[str, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for row in data["rows"]:
            spent = row["tpot_ms"] if "tpot_ms" in row else row["per_token_ms"]
            times[row["concurrency"], row.get("input", 0)][row["impl"]].append(spent)
        saved = [
            100 - 100 * statistics.median(found[OURS]) / statistics.median(found["stock"])
            for found in times.values()
        ]
        first = data["rows"][0]
        mode = ", eager" if first.get("eager") else ""
        mode += f", {first['layers']} layers" if first.get("layers") else ""
        gpu = meta["gpu"].removeprefix("NVIDIA ").split()[0]
        rows.append(
            (
                f"{meta['bench']} {meta['peers'][meta['bench']]}",
                f"{first.get('model', meta.get('model'))}{mode}",
                f"{meta['world']} x {gpu}",
                f"{min(saved):.1f} to {max(saved):.1f} %",
            )
        )
    header = ("engine", "shape, random weights", "GPUs", "less time per output token than stock")
    options = ", ".join(
        f"`{word.removeprefix('--server-option=')}`"
        for data in _results("sglang_h*.json")
        for word in data["meta"]["command"].split()
        if word.startswith("--server-option=")
    )
    environment = ", ".join(f"`{name}={value}`" for name, value in _environment().items())
    return (
        table(header, rows)
        + "\n\nBoth sides ran with settings that are not the engine's defaults. "
        + f"SGLang: {options}. vLLM: {environment}."
    )


def _environment() -> dict[str, str]:
    """What benchmarks/vllm.py sets for both of its engines."""
    text = (RESULTS.parent / "vllm.py").read_text()
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "ENVIRONMENT":
            return dict(ast.literal_eval(statement.value))
    raise KeyError("ENVIRONMENT")


def _vllm_run(data: dict[str, Any]) -> Iterator[str]:
    meta, rows = data["meta"], data["rows"]
    yield (
        f"{meta['gpu']}, tensor parallel {rows[0]['tp']}, torch {meta['torch']}, "
        f"{peers_of(meta)}; {run_of(meta)}"
    )
    found: dict[tuple[object, ...], dict[str, Any]] = defaultdict(dict)
    for row in rows:
        layers = "all" if row["layers"] is None else row["layers"]
        mode = "eager" if row["eager"] else "compiled, CUDA graphs"
        key = (row["model"], layers, mode, f"{row['input']}/{row['output']}", row["concurrency"])
        found[key][row["impl"]] = row
    header = ("model", "layers", "mode", "in/out", "requests at once")
    figures = ("stock, ms a token", "native, ms a token", "native / stock", "tokens/s")
    yield table((*header, *figures), (_vllm_row(key, pair) for key, pair in found.items()))
    if "profile" in data:
        yield _profile(data["profile"])


def _vllm_row(key: tuple[object, ...], pair: dict[str, Any]) -> tuple[object, ...]:
    stock, ours = pair["stock"], pair[OURS]
    return (
        *key,
        f"{stock['tpot_ms']:.2f}",
        f"{ours['tpot_ms']:.2f}",
        f"{ours['tpot_ms'] / stock['tpot_ms']:.3f}",
        f"{stock['tokens_per_s']:.0f}, {ours['tokens_per_s']:.0f}",
    )


def _profile(profile: dict[str, Any]) -> str:
    totals: dict[str, dict[str, tuple[float, float]]] = {}
    for impl, kernels in profile["kernels"].items():
        kinds: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for kernel, (calls, us) in kernels.items():
            kind = next((k for k, marks in KINDS.items() if any(m in kernel for m in marks)), REST)
            kinds[kind] = kinds[kind][0] + calls, kinds[kind][1] + us
        totals[impl] = kinds
    rows = [
        (kind, *(f"{totals[i][kind][1]:.0f} in {totals[i][kind][0]:.0f}" for i in ("stock", OURS)))
        for kind in (*KINDS, REST)
    ]
    return (
        f"Where a decode step's time goes at concurrency {profile['concurrency']}, from the "
        "profiler: microseconds of kernels, and their number.\n\n"
        + table(("", "stock", "native"), rows)
    )
