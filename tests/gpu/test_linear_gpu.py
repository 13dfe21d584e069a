"""The kernel behind `ops.linear` on a GPU, in every shape of its table. Run with ``-m gpu``."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
import torch
from torch import Tensor

from gemma_fold import ops
from gemma_fold.ops.operators.linear import (
    Shape,
    gelu_mul,
    gelu_mul_reference,
    most_tokens,
    run_shape,
)

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
TABLE = json.loads(files("gemma_fold.ops.kernels").joinpath("linear_shapes.json").read_text())
SHAPES = sorted(
    {
        Shape(warps, tiles, stages)
        for rows in (rows for by in TABLE.values() for rows in by.values())
        for _, _, warps, steps in rows
        for _, tiles, stages in steps
    },
    key=str,
)
#: Rows of the weight: fewer than a block has, no multiple of a block's, many.
ROWS = (3, 8, 200, 1000)
TOKENS = (1, 2, 5, 8, 9, 16)


def operands(tokens: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens * rows + columns)
    x = torch.randn(tokens, columns, device="cuda").bfloat16()
    return x, (torch.randn(rows, columns, device="cuda") * 0.02).bfloat16()


def check(y: Tensor, x: Tensor, weight: Tensor) -> None:
    exact = x.double() @ weight.double().T
    torchs = (torch.nn.functional.linear(x, weight).double() - exact).norm()
    assert (y.double() - exact).norm() <= 1.02 * torchs + 1e-9


@pytest.mark.parametrize("columns", (128, 640, 1152, 2560, 5376))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_as_near_to_float64_as_torch(shape: Shape, columns: int) -> None:
    for rows in ROWS:
        for tokens in TOKENS:
            if shape.shared(tokens) > 200 * 1024:
                continue
            x, weight = operands(tokens, rows, columns)
            guard = torch.full((2 * tokens, rows), float("nan"), device="cuda").bfloat16()
            del guard  # what is not written is likely to be NaN
            y = run_shape(x, weight, shape)
            check(y, x, weight)
            for row in {0, tokens - 1}:
                assert torch.equal(run_shape(x[row : row + 1], weight, shape)[0], y[row])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_in_the_kernel_is_gelu_after_it(shape: Shape) -> None:
    for rows in (2, 16, 200, 1000):
        for tokens in TOKENS:
            x, weight = operands(tokens, rows, 1152)
            y = run_shape(x, weight * 10, shape, gated=True)
            apart = run_shape(x, weight * 10, shape)
            assert y.shape == (tokens, rows // 2)
            # One rounding of results that differ by fp32's own noise in tanh.
            torch.testing.assert_close(y, gelu_mul_reference(apart), rtol=2**-7, atol=1e-4)
            assert (y != gelu_mul_reference(apart)).float().mean() < 0.02


@pytest.mark.parametrize("width", (1, 1000, 2048))
def test_gelu_of_many_tokens(width: int) -> None:
    x = torch.randn(33, 2 * width, device="cuda").bfloat16() * 4
    torch.testing.assert_close(gelu_mul(x), gelu_mul_reference(x), rtol=2**-7, atol=1e-4)


def test_shapes_of_one_number_of_warps_give_the_same_bits() -> None:
    x, weight = operands(8, 200, 2560)
    for warps in {shape.warps for shape in SHAPES}:
        results = [run_shape(x, weight, shape) for shape in SHAPES if shape.warps == warps]
        assert all(torch.equal(results[0], result) for result in results)


def test_strided_and_misaligned_tokens() -> None:
    wide, weight = operands(8, 64, 2560)
    shape = SHAPES[0]
    for x in (wide[::2], wide[:, 128:1664], wide.view(-1)[3 : 3 + 4 * 2560].view(4, 2560)):
        w = weight[:, : x.shape[1]].contiguous()
        assert torch.equal(run_shape(x, w, shape), run_shape(x.contiguous().clone(), w, shape))


def measured() -> list[tuple[int, int]]:
    found = TABLE.get(torch.cuda.get_device_name(), {"linear": []})
    return [(n, k) for n, k, *_ in found["linear"]]


def test_this_gpu_has_measured_shapes_or_says_torch() -> None:
    weight = torch.zeros(4096, 2560, dtype=torch.bfloat16, device="cuda")
    assert (most_tokens(weight) > 0) == ((4096, 2560) in measured())
    assert most_tokens(weight.float()) == most_tokens(weight.half()) == 0
    assert most_tokens(weight[:, 1:]) == 0


@pytest.mark.parametrize("tokens", (1, 4, 8, 16, 17))
def test_a_chain_in_a_graph_reads_what_was_just_written(tokens: int) -> None:
    """Each kernel may start before the one ahead of it has ended: x must still be its output."""
    if not measured():
        pytest.skip(f"no shape was measured on {torch.cuda.get_device_name()}")
    hidden, inner = 2560, 10240
    up = (torch.randn(inner, hidden, device="cuda") / hidden**0.5).bfloat16()
    down = (torch.randn(hidden, inner, device="cuda") / inner**0.5).bfloat16()
    gamma = torch.rand(hidden, device="cuda") + 0.5
    assert most_tokens(down) >= 8
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()

    def chain(x: Tensor) -> Tensor:
        for _ in range(20):
            x = ops.rms_norm(ops.linear(ops.linear(x, up), down), gamma)
        return x

    def apart(x: Tensor) -> Tensor:
        for _ in range(20):
            for step in (lambda x: ops.linear(x, up), lambda x: ops.linear(x, down)):
                x = step(x)
                torch.cuda.synchronize()
            x = ops.rms_norm(x, gamma)
            torch.cuda.synchronize()
        return x

    chain(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, apart(x))


def test_a_weight_that_was_just_changed_is_read_anew() -> None:
    x, _ = operands(4, 8, 2560)
    weight = torch.zeros(4096, 2560, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    ops.linear(x, weight)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        weight.add_(1.0)
        y = ops.linear(x, weight)
    for turn in range(1, 20):
        graph.replay()
        torch.cuda.synchronize()
        check(y, x, torch.full_like(weight, turn))
