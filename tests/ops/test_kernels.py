"""The kernels' logic on CPU, in Triton's interpreter: run by test_ops.py in a process of its own.

The interpreter truncates where hardware rounds, both to bf16 and to e4m3, so exact comparisons
use fp16 and fp32, and values that e4m3 holds exactly. Roundings are tested on the GPU.
"""

from __future__ import annotations

import os

import pytest
import reference
import torch
from norm_checks import (
    check_in_place,
    exact_norm,
    exact_rope,
    fused_qkv,
    gamma,
    pair_sizes,
    rows,
    table,
    ulps,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_ops.py with TRITON_INTERPRET=1", allow_module_level=True)

from gemma_fold import ops
from gemma_fold.ops import checks
from gemma_fold.ops.kernels.rms_norm import rms_norm_kernel
from gemma_fold.ops.operators import linear
from gemma_fold.ops.operators.rms_norm import plan as plan_rms_norm

EPS = 1e-6
LIMIT = {torch.bfloat16: 4.0, torch.float16: 1.0, torch.float32: 8.0}


def test_the_interpreter_is_what_runs() -> None:
    assert checks.INTERPRETED
    assert type(rms_norm_kernel).__name__ == "InterpretedFunction"


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("hidden", (1, 64, 100, 640, 641, 1152, 5376))
def test_equals_the_unfused_sequence(hidden: int, dtype: torch.dtype) -> None:
    x, residual = rows((3, hidden), dtype, 1, "cpu"), rows((3, hidden), dtype, 2, "cpu")
    post, pre = gamma(hidden, 3, "cpu"), gamma(hidden, 4, "cpu")
    normed = ops.rms_norm(x, post, EPS)
    assert ulps(normed, reference.rms_norm(x, post, EPS), dtype) <= LIMIT[dtype]
    y, total = ops.add_rms_norm(x, residual, pre, EPS)
    assert ulps(total, residual + x, dtype, residual, x) <= (dtype == torch.bfloat16)
    assert ulps(y, reference.rms_norm(total, pre, EPS), dtype) <= LIMIT[dtype]
    y, total = ops.rms_norm_add_rms_norm(x, residual, post, pre, EPS, 1e-5)
    assert ulps(total, residual + normed, dtype, normed, residual) <= LIMIT[dtype]
    assert ulps(y, reference.rms_norm(total, pre, 1e-5), dtype) <= LIMIT[dtype]
    check_in_place(x, residual, post, pre, EPS)


def test_rows_that_share_a_program_and_rows_left_over() -> None:
    x, gain = rows((1026, 64), torch.float32, 5, "cpu"), gamma(64, 6, "cpu")
    assert plan_rms_norm(x).constants["M"] > 1
    assert 1026 % plan_rms_norm(x).constants["M"]
    whole = ops.rms_norm(x, gain, EPS)
    assert ulps(whole, reference.rms_norm(x, gain, EPS), torch.float32) <= 8.0
    assert torch.equal(ops.rms_norm(x[1022:], gain, EPS), whole[1022:])


def test_strides_and_layouts() -> None:
    wide, gain = rows((10, 200), torch.float32, 7, "cpu"), gamma(64, 8, "cpu")
    for view in (
        wide[:, 64:128],
        wide[:, 3:67],
        wide[::2, :64],
        wide[:, :64].unflatten(0, (2, 5)),
        wide[:, :64].contiguous().view(2, 5, 64).transpose(0, 1),
        wide[0, :64],
        *heads_of_a_fused_tensor(),
    ):
        got = ops.rms_norm(view, gain, EPS)
        assert got.shape == view.shape
        assert torch.equal(got, ops.rms_norm(view.contiguous(), gain, EPS))


def heads_of_a_fused_tensor() -> list[Tensor]:
    """Query heads of tokens, of batches of tokens, with a gate between, and transposed."""
    fused = rows((10, 7 * 64 + 3), torch.float32, 18, "cpu")
    gated = rows((2, 5, 3, 128), torch.float32, 19, "cpu")
    heads = fused[:, 64 : 5 * 64].unflatten(1, (4, 64))
    return [
        heads,
        heads[:, 1:3],
        fused[:, 1 : 3 * 64 + 1].unflatten(1, (3, 64)),
        gated[..., :64],
        gated[:, :, 1:, 64:],
        heads.transpose(0, 1),
    ]


def test_heads_of_a_fused_tensor_by_the_formula() -> None:
    gain = gamma(64, 8, "cpu")
    for heads in heads_of_a_fused_tensor():
        got = ops.rms_norm(heads, gain, EPS)
        assert ulps(got, exact_norm(heads, gain, EPS), torch.float32) <= 8.0
        assert ops.rms_norm_fp8(heads, gain, eps=EPS)[0].shape == heads.shape


@pytest.mark.parametrize("static", (False, True))
def test_fp8_heads_lie_as_the_fake_says(static: bool) -> None:
    gain, scale = gamma(64, 8, "cpu"), torch.ones(1) if static else None
    for heads in heads_of_a_fused_tensor():
        arguments = (heads, gain, EPS, scale)
        real = torch.ops.gemma_fold.rms_norm_fp8(*arguments)
        with FakeTensorMode() as mode:
            moved = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
            fake = torch.ops.gemma_fold.rms_norm_fp8(*moved)
        for got, said in zip(real, fake, strict=True):
            assert (got.shape, got.stride(), got.dtype) == (said.shape, said.stride(), said.dtype)


def test_rows_of_three_strides_are_refused() -> None:
    x = rows((4, 3, 3, 128), torch.float32, 18, "cpu")[:, :2, :2, :64]
    with pytest.raises(ValueError, match="pass a contiguous copy"):
        ops.rms_norm(x, gamma(64, 19, "cpu"))


@pytest.mark.parametrize("heads", ((4, 1, 64), (3, 2, 96), (1, 1, 7)))
def test_qk_in_place_on_a_fused_tensor(heads: tuple[int, int, int]) -> None:
    q_heads, k_heads, size = heads
    sizes = [q_heads * size, k_heads * size, k_heads * size]
    qkv = rows((9, sum(sizes)), torch.float16, 9, "cpu")
    want = qkv.clone()
    gains = gamma(size, 10, "cpu"), gamma(size, 11, "cpu")

    def views(tensor: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = tensor.split(sizes, dim=1)
        return q.view(9, q_heads, size), k.view(9, k_heads, size)

    ops.qk_rms_norm(*views(qkv), *gains, EPS)
    reference.qk_rms_norm(*views(want), *gains, EPS)
    assert ulps(qkv, want, torch.float16) <= 1.0
    assert torch.equal(qkv[:, -sizes[2] :], want[:, -sizes[2] :])


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("wide_table", (False, True))
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize(
    ("heads", "rotary_dim"),
    (((4, 1, 128), 128), ((5, 2, 256), 64), ((3, 2, 96), 96), ((2, 1, 80), 20), ((1, 1, 7), 6)),
)
def test_rope_in_place_on_a_fused_tensor(
    heads: tuple[int, int, int],
    rotary_dim: int,
    interleaved: bool,
    wide_table: bool,
    dtype: torch.dtype,
) -> None:
    qkv, q, k = fused_qkv(9, heads, dtype, "cpu")
    kept = qkv[:, -heads[1] * heads[2] :].clone()
    gains = gamma(heads[2], 20, "cpu"), gamma(heads[2], 22, "cpu")
    cos_sin = table(300, rotary_dim, torch.float32 if wide_table else dtype, "cpu")
    positions = torch.tensor([299, 0, 1, 1, 298, 128, 7, 64, 33])
    normed = [reference.rms_norm(x, g, EPS) for x, g in zip((q, k), gains, strict=True)]
    unfused = [reference.rotate(y, cos_sin, positions, interleaved) for y in normed]
    ops.qk_rms_norm_rope(q, k, *gains, cos_sin, positions, EPS, interleaved=interleaved)
    for got, want, y in zip((q, k), unfused, normed, strict=True):
        exact = exact_rope(y, cos_sin[positions], interleaved)
        size = pair_sizes(y, rotary_dim, interleaved)
        assert ulps(got, want, dtype, size) <= LIMIT[dtype]
        # Half a unit for the sum, and half for each product where products round too.
        assert ulps(got, exact, dtype, size) <= LIMIT[dtype] + (0.5 if not wide_table else 0)
    assert torch.equal(qkv[:, -heads[1] * heads[2] :], kept)


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("kind", (torch.int32, torch.int64))
def test_a_position_outside_the_table_reads_nothing(kind: torch.dtype, interleaved: bool) -> None:
    _, q, k = fused_qkv(5, (2, 1, 64), torch.float32, "cpu")
    gain, cos_sin = gamma(64, 23, "cpu"), table(10, 32, torch.float32, "cpu")
    positions = torch.tensor([0, -1, 10, torch.iinfo(kind).max, 9], dtype=kind)
    ops.qk_rms_norm_rope(q, k, gain, gain, cos_sin, positions, EPS, interleaved=interleaved)
    for heads in (q, k):
        assert heads[1:4, :, :32].isnan().all()
        assert not heads[1:4, :, 32:].isnan().any() and not heads[[0, 4]].isnan().any()


def test_rope_rows_of_its_own_and_outputs_of_its_own() -> None:
    _, q, k = fused_qkv(6, (2, 1, 64), torch.float16, "cpu")
    gain, cos_sin = gamma(64, 24, "cpu"), table(6, 128, torch.float16, "cpu")[:, :64]
    given = q.unflatten(0, (2, 3)), k.unflatten(0, (2, 3))
    rest = gain, gain, cos_sin.unflatten(0, (2, 3)), None, EPS, False
    got = torch.ops.gemma_fold.qk_rms_norm_rope(*given, *rest)
    assert all(x.is_contiguous() for x in got)
    ops.qk_rms_norm_rope(q, k, gain, gain, cos_sin, torch.arange(6), EPS)
    assert torch.equal(got[0], given[0]) and torch.equal(got[1], given[1])


@pytest.mark.parametrize("per_token", (False, True))
def test_fp8_of_values_that_e4m3_holds(per_token: bool) -> None:
    signs = rows((5, 128), torch.float32, 12, "cpu").sign()
    gain = torch.tensor([0.5, 1.0, 1.75, 14.0, 448.0, 0.0, 2.0, 3.5] * 16)
    scale = None if per_token else torch.ones(1)
    zeros = torch.zeros_like(signs)
    results = [
        ops.rms_norm_fp8(signs, gain, 0.0, scale),
        ops.add_rms_norm_fp8(signs, zeros, gain, 0.0, scale),
        ops.rms_norm_add_rms_norm_fp8(signs, zeros, torch.ones(128), gain, 0.0, 0.0, scale),
    ]
    for y, got_scale, *_ in results:
        torch.testing.assert_close(y.float() * got_scale, signs * gain, rtol=1e-6, atol=0)


# numpy, in the interpreter, remarks on what is tested
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning:triton.runtime")
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_nan_and_infinity_propagate(value: float) -> None:
    x, gain = rows((4, 100), torch.float32, 13, "cpu"), gamma(100, 14, "cpu")
    x[1, 99] = value
    got, want = ops.rms_norm(x, gain, EPS), reference.rms_norm(x, gain, EPS)
    assert torch.equal(got.isnan(), want.isnan())
    scales = ops.rms_norm_fp8(x, gain, EPS)[1]
    assert scales.isnan().flatten().tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", LIMIT)
def test_backward(dtype: torch.dtype) -> None:
    x, grad = rows((7, 100), dtype, 15, "cpu"), rows((7, 100), dtype, 16, "cpu")
    gain = gamma(100, 17, "cpu")
    got = torch.ops.gemma_fold.rms_norm_backward(grad, x, gain, EPS)
    want = reference.rms_norm_backward(grad, x, gain, EPS)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_no_rows() -> None:
    assert ops.rms_norm(torch.empty(0, 64), torch.ones(64)).shape == (0, 64)
    assert torch.ops.gemma_fold.rms_norm_backward(
        torch.empty(0, 64), torch.empty(0, 64), torch.ones(64), EPS
    )[1].equal(torch.zeros(64))


# numpy, in the interpreter, remarks on what is tested
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning:triton.runtime")
@pytest.mark.parametrize("width", (1, 100, 1500))
def test_gelu_of_halves(width: int) -> None:
    x = rows((3, 2 * width), torch.float32, 18, "cpu") * 4
    gate, up = x.double().chunk(2, dim=-1)
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    want = 0.5 * gate * (1 + tanh) * up
    torch.testing.assert_close(linear.gelu_mul(x).double(), want, rtol=1e-5, atol=1e-5)
