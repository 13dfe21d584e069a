"""Compare two checkpoints, or two running models: structure, weights, outputs.

diff(a, b, options)          everything below, as one DiffReport with a Verdict
sides, structure, weights    headers, then bytes and the arithmetic of norms; no torch
outputs                      statistics of logits
tokens, engine, endpoint     what is read, and who reads it: transformers, or a server
report, html                 what people and programs get to see
"""

from gemma_fold.compare.report.verdict import DiffLimits, DiffReport, Verdict
from gemma_fold.compare.run import DiffOptions, diff

__all__ = ["DiffLimits", "DiffOptions", "DiffReport", "Verdict", "diff"]
