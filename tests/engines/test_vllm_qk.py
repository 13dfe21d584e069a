"""How native mode norms q and k in vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.config import CompilationMode

from gemma_fold.engines.vllm.norms import _uncached_qk_mode

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("mode", "lora", "flag", "chosen"),
    [
        (CompilationMode.NONE, None, "0", "fused"),
        (CompilationMode.NONE, object(), "0", "separate"),
        (CompilationMode.VLLM_COMPILE, None, "0", "inline"),
        (CompilationMode.VLLM_COMPILE, None, "1", "fused"),
        (CompilationMode.VLLM_COMPILE, object(), "1", "separate"),
    ],
)
def test_no_compiler_orders_a_sum_that_must_be_invariant(
    mode: CompilationMode, lora: object, flag: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", flag)
    compilation = SimpleNamespace(mode=mode)
    config = SimpleNamespace(compilation_config=compilation, lora_config=lora)
    assert _uncached_qk_mode(config) == chosen
