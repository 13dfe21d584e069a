"""The names of format 1, which every wing goes by."""

from __future__ import annotations

FORMAT = 1
#: The file with all that it takes to verify a folded checkpoint and to unfold it.
MANIFEST = "gemma_fold.json"
#: `model_type` of a folded `config.json`, and the key of its own block there.
MODEL_TYPE = "gemma_fold"
#: Before the names of the original's architectures, so that no loader takes them for its own.
ARCHITECTURE_PREFIX = "GemmaFold"
#: What wrote a folded checkpoint: only the first can be made again from its source.
CONVERTED, SAVED = "convert", "save_pretrained"
