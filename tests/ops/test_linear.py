"""`ops.linear` where no kernel runs, its table of shapes, and its kernel for Hopper, compiled."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_fold import ops
from gemma_fold.ops.operators import linear
from gemma_fold.ops.program import MOST_SHARED, compiled

TABLE: dict[str, dict[str, list[Any]]] = json.loads(
    files("gemma_fold.ops.kernels").joinpath("linear_shapes.json").read_text()
)
SHAPES = sorted(
    {
        (tokens > 8, operator == "gelu_linear", linear.Shape(warps, tiles, stages))
        for by in TABLE.values()
        for operator, rows in by.items()
        for _, _, warps, steps in rows
        for tokens, tiles, stages in steps
    },
    key=str,
)


def operands(*lead: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*lead, 256, generator=generator).bfloat16()
    return x, torch.randn(24, 256, generator=generator).bfloat16()


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 5), (0,)])
def test_is_the_product_of_torch_without_a_gpu(lead: tuple[int, ...]) -> None:
    x, weight = operands(*lead)
    assert torch.equal(ops.linear(x, weight), torch.nn.functional.linear(x, weight))
    assert linear.most_tokens(weight) == 0


def test_traces_without_a_break_and_gives_the_same() -> None:
    x, weight = operands(3)
    compiled_linear = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled_linear(x, weight), ops.linear(x, weight))
    torch.library.opcheck(torch.ops.gemma_fold.linear.default, (x, weight))


def test_gradients_are_those_of_the_product() -> None:
    x, weight = (one.float().requires_grad_() for one in operands(4))
    ours = torch.autograd.grad(ops.linear(x, weight).square().sum(), (x, weight))
    theirs = torch.autograd.grad((x @ weight.T).square().sum(), (x, weight))
    for got, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, exact)
    per_row = torch.func.vmap(lambda row: ops.linear(row, weight))(x)
    torch.testing.assert_close(per_row, x @ weight.T)


def gated(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = torch.nn.functional.linear(x, weight).double().chunk(2, dim=-1)
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    return 0.5 * gate * (1 + tanh) * up


@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0,)])
def test_gelu_linear_is_gelu_of_the_gates_times_the_rest(lead: tuple[int, ...]) -> None:
    x, weight = operands(*lead)
    weight = weight * 0.1
    y = ops.gelu_linear(x, weight)
    torch.testing.assert_close(y.double(), gated(x, weight), rtol=2**-8, atol=1e-6)
    compiled_linear = torch.compile(ops.gelu_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled_linear(x, weight), y)


def test_gradients_of_gelu_linear() -> None:
    x, weight = (one.double().requires_grad_() for one in operands(4))
    ours = torch.autograd.grad(ops.gelu_linear(x, weight).square().sum(), (x, weight))
    theirs = torch.autograd.grad(gated(x, weight).square().sum(), (x, weight))
    for got, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-3)


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight = operands(2)
    with pytest.raises(ValueError, match=r"x \[2, 255\] must end in the K of weight \[24, 256\]"):
        ops.linear(x[:, 1:], weight)
    with pytest.raises(TypeError, match="must have the same dtype"):
        ops.linear(x.float(), weight)
    with pytest.raises(ValueError, match="as many gates as other rows"):
        ops.gelu_linear(x, weight[1:])
    with pytest.raises(ValueError, match=r"weight must be \[N, K\]"):
        ops.linear(x, weight[0])


def test_shapes_in_the_table_fit_the_kernel() -> None:
    assert TABLE
    for rows in (rows for by in TABLE.values() for rows in by.values()):
        assert len({(n, k) for n, k, *_ in rows}) == len(rows)
        for n, k, warps, steps in rows:
            assert n % 8 == 0
            assert k % linear.CHUNK == 0
            tokens = [most for most, _, _ in steps]
            assert tokens == sorted(set(tokens))
            assert tokens[-1] <= linear.MOST_TOKENS
            for most, tiles, stages in steps:
                assert linear.Shape(warps, tiles, stages).shared(most) <= MOST_SHARED


@pytest.mark.slow
@pytest.mark.parametrize("many, gated, shape", SHAPES, ids=str)
def test_compiles_for_hopper(many: bool, gated: bool, shape: linear.Shape) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    defines = linear.defines(shape, 16 if many else 8, gated)
    assert compiled("kernels/linear.cu", (9, 0), tuple(defines.items()))[:4] == b"\x7fELF"
