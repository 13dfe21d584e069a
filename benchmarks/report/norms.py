"""docs/benchmarks.md, docs/benchmarks_points.md: the norm operators, their peers and a copy."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from benchmarks.report.frames import against_best, frame, geometric_mean, results, wide
from benchmarks.report.words import folded, provenance, table
from benchmarks.result import COPY, OURS, Result

TITLES = {
    "rms_norm": "RMSNorm",
    "add_rms_norm": "Residual add + RMSNorm",
    "rms_norm_add_rms_norm": "Sandwich: post-norm, residual add, pre-norm",
    "add_rms_norm_": "Residual add + RMSNorm, ours in place",
    "rms_norm_add_rms_norm_": "Sandwich: post-norm, residual add, pre-norm, ours in place",
    "qk_rms_norm": "q and k heads, in place on a fused tensor",
    "qk_rms_norm_rope": "q and k heads with rotary embedding, in place on a fused tensor",
    "rms_norm_fp8_static": "RMSNorm to e4m3, static scale",
    "add_rms_norm_fp8_static": "Residual add + RMSNorm to e4m3, static scale",
    "rms_norm_add_rms_norm_fp8_static": "Sandwich to e4m3, static scale",
    "rms_norm_fp8_per_token": "RMSNorm to e4m3, scale per token",
    "add_rms_norm_fp8_per_token": "Residual add + RMSNorm to e4m3, scale per token",
    "rms_norm_add_rms_norm_fp8_per_token": "Sandwich to e4m3, scale per token",
}
HOST = (
    "Microseconds until the call returns. Ours allocates its outputs, but operators that end in "
    "`_` work in place, as FlashInfer's add does. FlashInfer's norm and quack were given theirs."
)
#: Gemma 3 1B and 27B, tabled in full.
SHOWN = (1152, 5376)


def is_peer(op: str, impl: str) -> bool:
    """Whether an operator is judged by it: by compositions, where it replaces several launches."""
    several = op.startswith(("rms_norm_add", "qk"))
    return impl not in (OURS, COPY) and ("+" in impl or not several)


def norms() -> str:
    """A chapter for each run."""
    return "\n\n".join(part for result in results("norms") for part in _chapter(result))


def _chapter(result: Result) -> Iterator[str]:
    times = wide(result, "us")
    judged = against_best(times, is_peer)
    yield f"## {result.machine.device}, {result.date}\n\n{provenance(result)}"
    yield _summary(times, judged)
    yield f"### Where a peer is more than 3 % faster\n\n{_lost(judged)}"
    if "host_us" in frame(result):
        yield f"### Host time of one eager call\n\n{_host(wide(result, 'host_us'))}"


def points() -> str:
    """What the chapters of `norms` sum up."""
    return "\n\n".join(part for result in results("norms") for part in _points(result))


def _points(result: Result) -> Iterator[str]:
    times = wide(result, "us")
    yield f"## {result.machine.device}, {result.date}"
    yield (
        "### Where the sandwich takes more than 0.70 of the best two launches\n\n"
        "The second launch can find in the L2 what the first one wrote; then two move little more "
        "than one. Ours is about as fast as a copy there.\n\n"
        + folded("All such points", _bounded(times, against_best(times, is_peer)))
    )
    yield "### Microseconds"
    yield from (
        folded(f"{title} (<code>{op}</code>)", _details(times.loc[op], op))
        for op, title in TITLES.items()
        if op in times.index
    )


def _summary(times: pd.DataFrame, judged: pd.DataFrame) -> str:
    header = (
        *("operator", "points", "vs best: geometric mean", "vs best: worst", "points over 1.03"),
        *("vs FlashInfer: geometric mean", "vs torch.compile: worst", "of copy: lowest"),
    )
    rows = [
        (title, len(times.loc[op]), *_against(judged, op), *_beside(times.loc[op]))
        for op, title in TITLES.items()
        if op in times.index
    ]
    return table(header, rows)


def _against(judged: pd.DataFrame, op: str) -> tuple[object, ...]:
    if op not in judged.index:
        return "no peer", "", ""
    ratio = judged.loc[op, "ratio"]
    hidden, tokens = ratio.idxmax()
    return (
        f"{geometric_mean(ratio):.2f}",
        f"{ratio.max():.2f} (H {hidden}, {tokens} tokens)",
        (ratio > 1.03).sum(),
    )


def _beside(times: pd.DataFrame) -> tuple[str, str, str]:
    """Ours against FlashInfer, torch.compile and a copy, where there are such."""
    fastest = times[[name for name in times if "flashinfer" in name]].min(axis=1)
    flashinfer = (times[OURS] / fastest).dropna()
    compiled = (times[OURS] / times["torch.compile"]).dropna()
    large = times[times.index.get_level_values("tokens") >= 4096]
    copied = (large[COPY] / large[OURS]).min()
    return (
        "" if flashinfer.empty else f"{geometric_mean(flashinfer):.2f}",
        "" if compiled.empty else f"{compiled.max():.2f}",
        f"{100 * copied:.0f} %",
    )


def _lost(judged: pd.DataFrame) -> str:
    lost = judged[judged["ratio"] > 1.03]
    header = ("operator", "H", "tokens", "ours", "best peer", "which", "ratio")
    rows = [
        (TITLES[op], hidden, tokens, f"{r.ours:.2f}", f"{r.best:.2f}", r.which, f"{r.ratio:.2f}")
        for (op, hidden, tokens), r in lost.iterrows()
    ]
    return table(header, rows) if rows else "None."


def _bounded(times: pd.DataFrame, judged: pd.DataFrame) -> str:
    sandwich = judged.index.get_level_values("op").str.startswith("rms_norm_add_rms_norm")
    bound = judged[sandwich & (judged["ratio"] > 0.70)].join(times[COPY])
    header = (
        *("operator", "H", "tokens", "ours"),
        *("over the best two launches", "a copy", "over a copy"),
    )
    rows = [
        (
            *(TITLES[op], hidden, tokens, f"{r.ours:.2f}", f"{r.ratio:.2f}"),
            *(f"{r[COPY]:.2f}", f"{r.ours / r[COPY]:.2f}"),
        )
        for (op, hidden, tokens), r in bound.iterrows()
    ]
    return table(header, rows) if rows else "None."


def _host(times: pd.DataFrame) -> str:
    lines = [f"{HOST}\n"]
    for (op, hidden, _), row in times.iterrows():
        others = ", ".join(f"{name} {us:.1f}" for name, us in row.drop(OURS).dropna().items())
        lines.append(f"- {op}, H {hidden}: **ours {row[OURS]:.1f}**, {others}")
    return "\n".join(lines)


def _details(times: pd.DataFrame, op: str) -> str:
    parts = []
    for hidden, points in times.groupby(level="hidden", sort=True):
        if op.startswith("qk") or hidden in SHOWN:
            shown = points.droplevel("hidden").dropna(axis=1, how="all")
            names = [name for name in shown if name not in (OURS, COPY)]
            rows = (
                (
                    *(tokens, f"{row[COPY]:.2f}", f"**{row[OURS]:.2f}**"),
                    *("" if pd.isna(row[name]) else f"{row[name]:.2f}" for name in names),
                )
                for tokens, row in shown.iterrows()
            )
            header = ("tokens", "copy", "**ours**", *names)
            parts.append(f"H = {hidden}:\n\n{table(header, rows)}")
    return "\n\n".join(parts)
