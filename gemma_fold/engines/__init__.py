"""Run folded checkpoints: the folded norm module, and what teaches each engine to use it."""
