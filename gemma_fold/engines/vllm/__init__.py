"""vLLM serves folded checkpoints: a plug-in of its `vllm.general_plugins` group.

vLLM calls :func:`register` in each of its processes before it reads a config. Three functions are
wrapped there, and no model code is copied or replaced:

* `PreTrainedConfig.get_config_dict` hands every reader the original config.
* `record_metadata_for_reloading` meets each built model before its weights: zero-centred norms then
  take `[H, 1]` as gamma and `[H]` as w, on load and in live updates, and in native mode they run
  gemma-fold's operators.
* `BaseModelLoader.load_model` checks afterwards that every norm took its gamma.

A checkpoint that is not folded is served as if this package were not there, unless `GEMMA_FOLD`
asks for native mode.
"""

from __future__ import annotations

from gemma_fold.engines.checks import register_once


def register() -> None:
    """The entry point. Never raises: a plug-in that does stops vLLM for every model.

    If vLLM cannot be attached to, one warning gives the reason, and folded checkpoints are refused.
    """
    register_once("vLLM", "gemma_fold.engines.vllm.plugin", "vllm.gemma_fold")
