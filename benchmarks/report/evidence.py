"""Tables of what the programs in `tests` wrote to `tests/data`."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from benchmarks.report.frames import results
from benchmarks.report.words import table
from benchmarks.run import ROOT

DATA = ROOT / "tests" / "data"
_LOADED = {"loads": "loads, same logits", "differs": "**loads, other logits**"}


def _read(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text())


def fused() -> str:
    """What is fused: a row for each version, a column for each family of its engine."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in _read("fused"):
        found[row["engine"]][row["version"]].append(row)
    return "\n\n".join(_engine(engine, versions) for engine, versions in found.items())


def _engine(engine: str, versions: dict[str, list[dict[str, Any]]]) -> str:
    families = list(dict.fromkeys(row["family"] for rows in versions.values() for row in rows))
    on_gpus = {result.versions.get(engine) for result in results(engine)}
    lines = []
    for version, rows in versions.items():
        cells = {row["family"]: f"{row['fused']} of {row['expected']}" for row in rows}
        levels = sorted({row["level"] for row in rows}) + ["run on GPUs"] * (version in on_gpus)
        named = (cells.get(family, "not there") for family in families)
        lines.append([version, *named, ", ".join(levels)])
    return table((engine, *families, "level"), lines)


def loaders() -> str:
    """Ways to load, a row each: with both locks, then with the tensor lock alone."""
    found = _read("loaders")
    rows = [
        (
            f"{row['tool']} {row['version']}",
            row["call"],
            _outcome(row["folded"]),
            _outcome(row["tensor_lock_alone"]),
        )
        for row in found.values()
    ]
    header = ("tool", "called by", "folded checkpoint", "with the original's config.json put back")
    return f"{table(header, rows)}\n\n{_when(found)}"


def checked() -> str:
    """Files that real tools wrote, a row each: what `check` says of them."""
    found = _read("checked")
    rows = [(row["tool"], row["call"], row["line"]) for row in found.values()]
    return f"{table(('tool', 'called by', 'verdict'), rows)}\n\n{_when(found)}"


def check_files() -> str:
    """Files whose verdict is known, a row for each format."""
    rows: list[dict[str, Any]] = _read("check_cases")
    lines: list[Any] = []
    for form in dict.fromkeys(row["format"] for row in rows):
        ours = [row for row in rows if row["format"] == form]
        right = sum(row["exit"] == 0 for row in ours)
        families = len({row["family"] for row in ours})
        lines.append((form, families, len(ours), right, len(ours) - right))
    total = [sum(line[n] for line in lines) for n in (2, 3, 4)]
    lines.append(("**all**", len({row["family"] for row in rows}), *total))
    return table(("format", "families", "files", "right", "wrong or rounded"), lines)


def check_kinds() -> str:
    """The same files, a row for each thing that was done to them."""
    found: dict[tuple[str, str, int], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in _read("check_cases"):
        key = (row["file"], ", ".join(row["finding"]), row["exit"])
        found[key]["formats"].add(row["format"])
        found[key]["families"].add(row["family"])
    lines = [
        (what, ", ".join(sorted(seen["formats"])), len(seen["families"]), finding, code)
        for (what, finding, code), seen in found.items()
    ]
    lines.sort(key=lambda line: (line[4], line[3]))
    return table(("file", "formats", "families", "finding", "exit code"), lines)


def _when(found: dict[str, Any]) -> str:
    dates = sorted({row["date"] for row in found.values()})
    return f"Run {' to '.join(dates[:: max(1, len(dates) - 1)])}."


def _outcome(result: dict[str, Any]) -> str:
    words = result["words"].replace("|", "\\|").replace("`", "'")
    if result["outcome"] == "stops":
        return f"stops: `{words}`"
    if result["outcome"] == "writes":
        return f"copies: writes {words}"
    return _LOADED[result["outcome"]]


def crash_matrix() -> str:
    """Trials by command and file system, and how many of them found a problem."""
    reports: list[dict[str, Any]] = _read("crash_matrix")
    systems = list(dict.fromkeys(report["file_system"] for report in reports))
    trials: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(systems, 0))
    calls: dict[str, int] = defaultdict(int)
    for report in reports:
        for scene, faults in report["counts"].items():
            trials[scene][report["file_system"]] += sum(faults.values())
            calls[scene] = max(calls[scene], report["calls"][scene])
    rows = [
        (f"`{scene}`", calls[scene], *(f"{count:,}" if count else "" for count in counts.values()))
        for scene, counts in trials.items()
    ]
    total = sum(report["trials"] for report in reports)
    failures = sum(len(report["failures"]) for report in reports)
    commits = ", ".join(sorted({f"`{report['commit'][:7]}`" for report in reports}))
    return (
        f"{table(('command', 'calls tried', *(f'trials, {s}' for s in systems)), rows)}\n\n"
        f"{total:,} trials, {failures} problems (Linux {reports[0]['kernel']}, "
        f"Python {reports[0]['python']}, commit {commits})."
    )


def fuzz() -> str:
    """Executions and findings of each target."""
    found: dict[str, Any] = _read("fuzz")
    rows = [
        (name, f"{target['executions']:,}", len(target["findings"]), f"`{target['commit']}`")
        for name, target in found["targets"].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{table(('reader', 'executions', 'findings', 'commit'), rows)}\n\n"
        f"{found['executions']:,} executions, {found['findings']} findings in "
        f"{found['seconds']:.0f} s of 16 processes ({versions})."
    )


def rl_sync() -> str:
    """What `make rl-sync` found after each update."""
    if not (DATA / "rl_sync.json").exists():
        return "Not run with the real model yet."
    rows = []
    for run in _read("rl_sync"):
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        for one in run["updates"]:
            norms = f"{one['norms'] + one['states']} of {one['compared']:,}"
            gaps = (f"{one[name]:.2e}" for name in ("sampled", "whole", "blocks"))
            rows.append((f"{run['mode']}, {versions}", one["update"], one["form"], norms, *gaps))
    header = (
        *("rollout", "update", "pushed", "values of norms that differ"),
        *("gap as sampled", "gap in one pass", "gap with the rollout's blocks"),
    )
    return table(header, rows)
