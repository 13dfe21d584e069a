"""FSDP2 of folded models, on two processes over gloo: the bits of a model that is not sharded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import patience
import pytest

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("fsdp_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("fsdp")
    results = [folder / f"{rank}.json" for rank in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(folder / "store"), str(result)],
            stderr=subprocess.PIPE,
        )
        for rank, result in enumerate(results)
    ]
    try:
        errors = [one.communicate(timeout=patience.seconds(300))[1] for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [0, 0], b"\n".join(errors).decode()[-4000:]
    return [json.loads(result.read_text()) for result in results]


@pytest.mark.parametrize("how", ["plain", "checkpointing"])
def test_bf16_weights_and_float32_gammas_train_as_on_one_process(
    how: str, ranks: list[Any]
) -> None:
    for found in ranks:
        assert found[how]["logits"]
        assert found[how]["different"] == []
        assert found[how]["trained"]
        assert found[how]["gammas"] == ["torch.float32"] * 13


def test_a_mixed_precision_policy_leaves_gammas_alone(ranks: list[Any]) -> None:
    for found in ranks:
        assert found["mixed"] == {"logits": True, "seen": ["torch.float32"]}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("alone", "expects uniform original parameter dtype"),
        ("policy", "UsageError: gammas stay float32"),
        ("original", "UnsupportedModelError: Gemma3ForCausalLM is not folded"),
        ("twice", "UnsupportedModelError: the model is sharded already"),
        ("unfold", "UnsupportedModelError: the model is sharded"),
    ],
)
def test_what_is_refused(case: str, message: str, ranks: list[Any]) -> None:
    assert message in ranks[0]["refusals"][case]
