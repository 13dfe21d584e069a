"""SGLang serves folded checkpoints: `python -m sglang.launch_server --model-path FOLDED`, no flags.

SGLang finds :func:`register` through the `sglang.srt.plugins` entry point in each of its processes.
What it changes there:

* configs: `plugin.py` hands SGLang the original's config, so everything that is keyed on a model
  type or an architecture works as for the original;
* weights: `weights.py` hands every loader raw weights, whatever was folded, and counts them;
* norms: `norms.py` keeps the exact fp32 gain beside each zero-centred weight, in step with it;
* kernels: `norms.py` and `layers.py` run gemma-fold's on that gain, `all_reduce.py` gives SGLang's
  fused all-reduce exact weights, and `boundary.py` has its other fusions decline native norms.

Models that are not folded keep every object and function they had.
"""

from __future__ import annotations

from gemma_fold.engines.checks import register_once


def register() -> None:
    """The entry point, which SGLang calls. Never raises.

    If SGLang lacks what gemma-fold attaches to, one warning gives the reason, and folded
    checkpoints are refused.
    """
    register_once("SGLang", "gemma_fold.engines.sglang.plugin", "gemma_fold")
