"""Fixtures of SGLang's tests. What they import is there in SGLang's environment alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sglang_checkpoints import Checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Tiny checkpoints of each family, original and folded, made when asked for."""
    from sglang_checkpoints import Checkpoints

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def sglang(checkpoints: Checkpoints) -> Any:
    """SGLang in this process, with gemma-fold in it as in a server."""
    import sglang_models

    sglang_models.start(checkpoints.original("gemma3_text"))
    return sglang_models
