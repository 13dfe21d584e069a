"""The gains that SGLang's fused kernels compute with, and gemma-fold's kernels in its norms."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is in an environment of its own", allow_module_level=True)

from sglang_checkpoints import Checkpoints

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SGLang in this process, with gemma-fold in it as in a server."""
    import sglang_models

    folder = tmp_path_factory.mktemp("checkpoints")
    sglang_models.start(Checkpoints(folder).original("gemma3_text"))
    return sglang_models


class FlashInfer:
    """FlashInfer's fused all-reduce for ranks that all have the same input, and the gains it used.

    Its kernel adds `weight_bias` to the weight in fp32 before it multiplies.
    """

    AllReduceFusionPattern = SimpleNamespace(kARResidualRMSNorm=1)

    def __init__(self) -> None:
        self.gains: list[torch.Tensor] = []

    def allreduce_fusion(
        self,
        *,
        input: torch.Tensor,
        residual_in: torch.Tensor,
        residual_out: torch.Tensor,
        norm_out: torch.Tensor,
        rms_gamma: torch.Tensor,
        rms_eps: float,
        weight_bias: float = 0.0,
        **_: Any,
    ) -> None:
        self.gains.append(weight_bias + rms_gamma.float())
        residual_out.copy_(input * 2 + residual_in)
        x = residual_out.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + rms_eps)
        norm_out.copy_((x * self.gains[-1]).to(norm_out.dtype))


@pytest.fixture
def flashinfer(sglang: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashInfer]:
    """Two ranks and a FlashInfer, as far as SGLang's fused path can tell."""
    from sglang.srt.layers import flashinfer_comm_fusion as fusion
    from sglang.srt.layers import layernorm

    from gemma_fold.runtime.sglang import all_reduce

    # SGLang registers its function for CUDA alone; called past the operator, it runs here.
    name = "flashinfer_allreduce_residual_rmsnorm"
    functions = (found for found in gc.get_objects() if isinstance(found, FunctionType))
    fused = next(f for f in functions if f.__name__ == name and f.__module__ == fusion.__name__)
    monkeypatch.setattr(fusion, name, fused)
    comm = FlashInfer()
    manager = SimpleNamespace(workspace=object(), backend="trtllm")
    monkeypatch.setattr(fusion, "_flashinfer_comm", comm)
    monkeypatch.setattr(fusion, "is_flashinfer_available", lambda: True)
    monkeypatch.setattr(fusion, "resolve_fusion_world_size", lambda **_: 2)
    monkeypatch.setattr(fusion, "ensure_workspace_initialized", lambda **_: True)
    monkeypatch.setattr(fusion, "_get_workspace_manager", lambda _: manager)
    monkeypatch.setattr(layernorm, "get_parallel", lambda: SimpleNamespace(attn_tp_size=2))
    monkeypatch.setattr(all_reduce, "attention_group_size", lambda: 2)
    all_reduce._takes_bias.cache_clear()
    yield comm
    all_reduce._takes_bias.cache_clear()


@pytest.fixture
def weight() -> torch.Tensor:
    """Every bf16 number from 2^-10 to 64, with both signs."""
    bits = torch.arange(0x3A80, 0x4281, dtype=torch.int16)
    positive = bits.view(torch.bfloat16)
    return torch.cat([positive, -positive])


def norm_with(weight: torch.Tensor, prepare: Callable[[Any], None]) -> Any:
    from sglang.srt.layers.layernorm import GemmaRMSNorm

    norm = GemmaRMSNorm(weight.shape[0]).to(torch.bfloat16)
    prepare(norm)
    norm.weight.weight_loader(norm.weight, weight)
    return norm


def adopted(norm: Any) -> None:
    from gemma_fold.runtime.sglang.all_reduce import StockNorm
    from gemma_fold.runtime.sglang.norms import adopt

    adopt(norm, StockNorm)


def test_the_fused_all_reduce_gets_exact_gains(
    flashinfer: FlashInfer, weight: torch.Tensor
) -> None:
    """SGLang's own are up to 0.389 % off; the result is that of SGLang's unfused norm."""
    generator = torch.Generator().manual_seed(5)
    x, residual = torch.randn(2, 3, weight.shape[0], generator=generator).bfloat16()
    stock, ours = norm_with(weight, lambda norm: None), norm_with(weight, adopted)
    exact = 1 + weight.double()

    stock.forward_with_allreduce_fusion(x, residual)
    fused = ours.forward_with_allreduce_fusion(x, residual, residual)
    theirs, found = (gain.double() for gain in flashinfer.gains)
    nonzero = exact != 0
    error = (theirs / exact - 1)[nonzero].abs().max().item()
    assert error == pytest.approx(0.00389, abs=1e-5)
    assert torch.equal(found, exact)

    for got, expected in zip(fused, stock.forward(x * 2, residual + residual), strict=True):
        assert torch.equal(got, expected)


def test_the_fused_path_is_still_sglangs_own_method(sglang: Any, weight: torch.Tensor) -> None:
    """SGLang asks for it by identity before it keeps a residual."""
    from sglang.srt.layers.layernorm import Gemma3RMSNorm, GemmaRMSNorm

    norm = norm_with(weight, adopted)
    assert isinstance(norm, GemmaRMSNorm)
    method = type(norm).forward_with_allreduce_fusion
    assert method is GemmaRMSNorm.forward_with_allreduce_fusion
    third = Gemma3RMSNorm(8)
    adopted(third)
    assert not hasattr(third, "forward_with_allreduce_fusion")
