"""Fixtures of engines' tests. What SGLang's import is there in its environment alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gemma_fold.commands.convert import convert

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


@pytest.fixture(scope="session")
def folded_270m(real_270m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "folded"
    convert(real_270m, folder)
    return folder
