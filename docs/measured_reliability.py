"""Tables of docs/reliability.md: what the crash matrix and the long fuzzing runs found."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from measured import table

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"


def crash_matrix() -> str:
    """Trials by command and file system, and how many of them found a problem."""
    reports: list[dict[str, Any]] = json.loads((DATA / "crash_matrix.json").read_text())
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
    found: dict[str, Any] = json.loads((DATA / "fuzz.json").read_text())
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
