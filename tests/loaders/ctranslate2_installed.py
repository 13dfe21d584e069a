"""CTranslate2 in a process that has gemma-fold's integration into transformers."""

from __future__ import annotations

import probe
from ctranslate2_convert import load

if __name__ == "__main__":
    probe.report("ctranslate2", load, aware=True)
