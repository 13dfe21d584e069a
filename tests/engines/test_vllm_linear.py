"""What native mode may do to linear layers in vLLM: which blocks it takes, what they compute."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

vllm = pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.activation import GeluAndMul  # noqa: E402
from vllm.model_executor.models import gemma, gemma2, gemma3, qwen2  # noqa: E402

from gemma_fold.engines.vllm import linear  # noqa: E402
from gemma_fold.errors import UsageError  # noqa: E402

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "block", [gemma.GemmaMLP, gemma2.Gemma2MLP, gemma3.Gemma3MLP, qwen2.Qwen2MLP], ids=str
)
def test_blocks_of_vllm_are_known_by_what_they_do(block: type) -> None:
    assert linear._is_gated(block)


class _Scaled(nn.Module):
    def forward(self: Any, x: Any) -> Any:
        gate_up, _ = self.gate_up_proj(x)
        return self.down_proj(self.act_fn(gate_up * 2))[0]


class _Branching(nn.Module):
    def forward(self: Any, x: Any) -> Any:
        gate_up, _ = self.gate_up_proj(x)
        if self.training:
            return gate_up
        return self.down_proj(self.act_fn(gate_up))[0]


class _Looking(nn.Module):
    def forward(self: Any, x: Any) -> Any:
        gate_up, _ = self.gate_up_proj(x)
        y = self.down_proj(self.act_fn(gate_up))[0]
        return y, gate_up


class _Bare(nn.Module):
    def forward(self: Any, x: Any) -> Any:
        return self.down_proj(self.gate_up_proj(x)[0])[0]


@pytest.mark.parametrize("block", [_Scaled, _Branching, _Looking, _Bare, nn.Linear])
def test_blocks_that_do_more_or_less_are_left_alone(block: type) -> None:
    assert not linear._is_gated(block)


def test_gelu_method_is_vllms_product_and_vllms_gelu() -> None:
    torch.manual_seed(0)
    layer: Any = SimpleNamespace(weight=torch.randn(64, 128).bfloat16() * 0.1)
    x = torch.randn(5, 128).bfloat16()
    with set_current_vllm_config(VllmConfig()):
        method = linear.GeluLinearMethod()
        theirs = GeluAndMul(approximate="tanh").forward_native(x @ layer.weight.T)
    torch.testing.assert_close(method.apply(layer, x), theirs, rtol=2**-7, atol=1e-6)


def test_linear_method_is_vllms_product() -> None:
    layer: Any = SimpleNamespace(weight=torch.randn(64, 128).bfloat16())
    x = torch.randn(5, 128).bfloat16()
    with set_current_vllm_config(VllmConfig()):
        method = linear.StreamedLinearMethod()
    assert torch.equal(method.apply(layer, x), x @ layer.weight.T)


def test_what_keeps_layers_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(kernel_config=SimpleNamespace(linear_backend="auto"))
    assert linear.unstreamed(config) == ""
    assert "--linear-backend=cutlass" in linear.unstreamed(
        SimpleNamespace(kernel_config=SimpleNamespace(linear_backend="cutlass"))
    )
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "VLLM_BATCH_INVARIANT" in linear.unstreamed(config)
    monkeypatch.setenv("GEMMA_FOLD_LINEAR", "stock")
    assert linear.unstreamed(config) == "GEMMA_FOLD_LINEAR=stock"
    monkeypatch.setenv("GEMMA_FOLD_LINEAR", "fast")
    with pytest.raises(UsageError, match="expected 'streamed' or 'stock'"):
        linear.unstreamed(config)


def test_no_layer_changes_without_a_gpu() -> None:
    assert linear.stream([nn.Sequential(nn.Linear(2, 2))], adapters=False) == (0, 0)
