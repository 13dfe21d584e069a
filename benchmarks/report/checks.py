"""What ran on GPUs beside the benchmarks: compute-sanitizer, and the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.report.frames import results
from benchmarks.report.words import provenance, table
from benchmarks.result import Result


def all_reduce_sanitizer() -> str:
    return _chapters("all_reduce_sanitizer", _sanitized)


def norms_sanitizer() -> str:
    return _chapters("norms_sanitizer", _sanitized)


def gpu_tests() -> str:
    return _chapters("gpu_tests", _tested)


def _chapters(what: str, told: Callable[[Result], str]) -> str:
    return "\n\n".join(f"{provenance(result)}\n\n{told(result)}" for result in results(what))


def _sanitized(result: Result) -> str:
    def rows() -> Iterator[tuple[object, ...]]:
        for row in result.rows:
            said = "; ".join(sorted(set(row.values["summary"])))
            yield row.case["tool"], row.values["calls"], said

    return table(("tool", "calls in each process", "found"), rows())


def _tested(result: Result) -> str:
    header = ("tests", "GPUs", "passed", "failed", "left out", "seconds")
    rows = (
        (
            *(row.case["tests"], row.case["gpus"], row.values["passed"], row.values["failed"]),
            *("; ".join(row.values["skipped"]), row.values["seconds"]),
        )
        for row in result.rows
    )
    return table(header, rows)
