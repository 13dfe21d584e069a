"""Compare two checkpoints, or two running models: structure, weights, outputs.

run        diff(a, b, options): everything below, as one DiffReport with a Verdict
sides      what is compared: headers, configs and where the bytes lie
structure  names, shapes, dtypes and config keys
weights    bytes, and the arithmetic of norms; no torch
outputs    what transformers, vLLM or a server answers, and its statistics
report     the verdict, and what people and programs get to see of it

files      for `check`: norms in the formats of other tools
offsets    for `check`: where their +1 is
"""

from gemma_fold.compare.report.verdict import DiffLimits, DiffReport, Verdict
from gemma_fold.compare.run import DiffOptions, diff

__all__ = ["DiffLimits", "DiffOptions", "DiffReport", "Verdict", "diff"]
