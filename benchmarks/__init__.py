"""Benchmarks: programs that measure, and what the documents say of what they measured.

Each is a module, run from the repository's root: `python -m benchmarks.norms --out NAME.json`.
They need no more than what they time. What they find is a `benchmarks.result.Result` in
`benchmarks/results/`; `python -m benchmarks.report`, which needs the `bench` extra, makes the
documents' tables and plots of those.
"""
