"""The operators on CPU: exact numerics, gradients, registration, tracing, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
from norm_checks import check_in_place, exact_norm, gamma, rows
from torch import Tensor

from gemma_fold import ops

EPS = 1e-6
KERNELS = ("test_kernels.py", "test_cache_kernels.py")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_bit_identical_to_the_stock_norms(dtype: torch.dtype) -> None:
    gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    norms = [gemma3.Gemma3RMSNorm(640, EPS).to(dtype) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    post, pre = (1.0 + norm.weight.detach().float() for norm in norms)
    x, residual = rows((3, 7, 640), dtype, 1, "cpu"), rows((3, 7, 640), dtype, 2, "cpu")
    with torch.no_grad():
        assert torch.equal(ops.rms_norm(x, post, EPS), norms[0](x))
        y, total = ops.add_rms_norm(x, residual, pre, EPS)
        assert torch.equal(total, residual + x)
        assert torch.equal(y, norms[1](residual + x))
        y, total = ops.rms_norm_add_rms_norm(x, residual, post, pre, EPS, EPS)
        assert torch.equal(total, residual + norms[0](x))
        assert torch.equal(y, norms[1](residual + norms[0](x)))
        check_in_place(x, residual, post, pre, EPS)
        heads = x.view(21, 5, 128).clone()
        ops.qk_rms_norm(heads[:, :3], heads[:, 3:], post[:128], pre[:128], EPS)
        assert torch.equal(heads[:, :3], ops.rms_norm(x.view(21, 5, 128)[:, :3], post[:128], EPS))
        assert torch.equal(heads[:, 3:], ops.rms_norm(x.view(21, 5, 128)[:, 3:], pre[:128], EPS))


def test_fp8_scales_and_saturates() -> None:
    x = torch.tensor([[3.0, -4.0, 0.0, 5.0], [0.0] * 4])
    gain = torch.ones(4)
    y, scale = ops.rms_norm_fp8(x, gain, 0.0 + EPS)
    normed = ops.rms_norm(x, gain, EPS)
    assert scale[0].item() == pytest.approx(normed[0].max().item() / 448.0)
    assert scale[1].item() == pytest.approx(1.0 / (448.0 * 512.0))
    assert y[0].float().max() == 448.0
    assert torch.equal(y[1].float(), torch.zeros(4))
    tiny = torch.tensor([1e-4])
    saturated, same = ops.rms_norm_fp8(x, gain, EPS, tiny)
    assert same is tiny
    assert saturated[0].float().tolist() == [448.0, -448.0, 0.0, 448.0]
    x[0, 0] = float("nan")
    assert ops.rms_norm_fp8(x, gain, EPS, tiny)[0][0].float().isnan().all()


def test_gradients_match_float64() -> None:
    x, residual = rows((6, 40), torch.float32, 3, "cpu"), rows((6, 40), torch.float32, 4, "cpu")
    ours = [t.requires_grad_() for t in (x, residual, gamma(40, 5, "cpu"), gamma(40, 6, "cpu"))]
    y, total = ops.rms_norm_add_rms_norm(*ours)
    (y.square().sum() + total.sum()).backward()
    exact = [t.detach().double().requires_grad_() for t in ours]
    total64 = exact[1] + exact_norm(exact[0], exact[2], EPS)
    (exact_norm(total64, exact[3], EPS).square().sum() + total64.sum()).backward()
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_operators_pass_opcheck() -> None:
    x, residual = rows((4, 64), torch.float32, 7, "cpu"), rows((4, 64), torch.float32, 8, "cpu")
    gain = gamma(64, 9, "cpu")
    heads = rows((4, 6, 64), torch.float32, 10, "cpu")
    table = torch.ops.gemma_fold
    torch.library.opcheck(
        table.rms_norm, (x.clone().requires_grad_(), gain.clone().requires_grad_(), EPS)
    )
    torch.library.opcheck(table.rms_norm, (heads.transpose(0, 1), gain, EPS))
    turned = heads.transpose(0, 1)
    torch.library.opcheck(table.rms_norm_backward, (turned.clone(), turned, gain, EPS))
    torch.library.opcheck(table.add_rms_norm, (x, residual, gain, EPS))
    torch.library.opcheck(table.rms_norm_add_rms_norm, (x, residual, gain, gain, EPS, EPS))
    torch.library.opcheck(table.add_rms_norm_, (x.clone(), residual.clone(), gain, EPS))
    in_place = (x.clone(), residual.clone(), gain, gain, EPS, EPS)
    torch.library.opcheck(table.rms_norm_add_rms_norm_, in_place)
    q, k = heads[:, :4].clone(), heads[:, 4:].clone()
    torch.library.opcheck(table.qk_rms_norm, (heads[:, :4], heads[:, 4:], gain, gain, EPS))
    torch.library.opcheck(table.qk_rms_norm_, (q, k, gain, gain, EPS))
    for scale in (None, torch.ones(1)):
        torch.library.opcheck(table.rms_norm_fp8, (x, gain, EPS, scale))
        torch.library.opcheck(table.rms_norm_fp8, (turned, gain, EPS, scale))
        torch.library.opcheck(table.add_rms_norm_fp8, (x, residual, gain, EPS, scale))
        sandwich = (x, residual, gain, gain, EPS, EPS, scale)
        torch.library.opcheck(table.rms_norm_add_rms_norm_fp8, sandwich)


def test_traces_without_graph_breaks_or_recompilation() -> None:
    gain = gamma(64, 11, "cpu")
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return module.forward

    def layer(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        y, total = ops.rms_norm_add_rms_norm(x, residual, gain, gain)
        q, k = (y * 1).view(-1, 4, 16).split([3, 1], dim=1)
        ops.qk_rms_norm(q, k, gain[:16], gain[16:32])
        z, again = x * 1, residual * 1
        ops.add_rms_norm_(z, again, gain)
        ops.rms_norm_add_rms_norm_(z, again, gain, gain)
        return (
            z,
            again,
            ops.rms_norm(y, gain),
            total,
            q,
            k,
            *ops.add_rms_norm_fp8(x, residual, gain),
        )

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for tokens in (5, 2, 40):
        x = rows((tokens, 64), torch.bfloat16, tokens, "cpu")
        for got, want in zip(compiled(x, x), layer(x, x), strict=True):
            assert torch.equal(got.float(), want.float())
    assert graphs == 1


def test_function_transforms_and_dispatch_modes_see_the_operator() -> None:
    x, gain = rows((3, 64), torch.float32, 12, "cpu"), gamma(64, 13, "cpu")
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda a, b: ops.rms_norm(a, b))(x, gain)
    assert "gemma_fold.rms_norm" in traced.code


X = torch.zeros(4, 64, dtype=torch.bfloat16)
GAIN = torch.ones(64)
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "bf16 gamma": (lambda: ops.rms_norm(X, GAIN.bfloat16()), TypeError, "gamma must be float32"),
    "gamma [H, 1]": (lambda: ops.rms_norm(X, GAIN[:, None]), ValueError, r"gamma.view\(-1\)"),
    "short gamma": (lambda: ops.rms_norm(X, GAIN[:63]), ValueError, "shape \\[64\\]"),
    "strided gamma": (
        lambda: ops.rms_norm(X, torch.ones(128)[::2]),
        ValueError,
        "gamma must be contiguous",
    ),
    "integer x": (lambda: ops.rms_norm(X.int(), GAIN), TypeError, "x must be bfloat16"),
    "float64 x": (lambda: ops.rms_norm(X.double(), GAIN), TypeError, "x must be bfloat16"),
    "scalar x": (lambda: ops.rms_norm(torch.tensor(1.0), GAIN), ValueError, "one dimension"),
    "wide x": (
        lambda: ops.rms_norm(torch.zeros(1, 16385), torch.ones(16385)),
        ValueError,
        "16385 columns",
    ),
    "residual dtype": (lambda: ops.add_rms_norm(X, X.float(), GAIN), TypeError, "residual is"),
    "residual shape": (lambda: ops.add_rms_norm(X, X[:2], GAIN), ValueError, "residual has shape"),
    "meta device": (lambda: ops.rms_norm(X, GAIN.to("meta")), ValueError, "gamma is on meta"),
    "k heads": (
        lambda: ops.qk_rms_norm(X.view(4, 2, 32), X.view(4, 1, 64), GAIN[:32], GAIN),
        ValueError,
        "may differ only in heads",
    ),
    "q and k overlap": (
        lambda: ops.qk_rms_norm(X.view(4, 2, 32), X.view(4, 2, 32), GAIN[:32], GAIN[:32]),
        ValueError,
        "share memory",
    ),
    "x and residual overlap": (
        lambda: ops.add_rms_norm_(X[:3], X[1:], GAIN),
        ValueError,
        "x and residual share memory",
    ),
    "x is its own residual": (
        lambda: ops.rms_norm_add_rms_norm_(X, X, GAIN, GAIN),
        ValueError,
        "x and residual share memory",
    ),
    "strided in place": (
        lambda: ops.add_rms_norm_(X.clone(), torch.zeros(4, 128).bfloat16()[:, :64], GAIN),
        ValueError,
        "residual is written in place and must be contiguous",
    ),
    "gradient in place": (
        lambda: ops.add_rms_norm_(X.clone(), X, GAIN.clone().requires_grad_()),
        ValueError,
        "no backward",
    ),
    "repeated q": (
        lambda: ops.qk_rms_norm(
            X[:1].view(1, 2, 32).expand(4, 2, 32), X.view(4, 2, 32) + 1, GAIN[:32], GAIN[:32]
        ),
        ValueError,
        "more than one index",
    ),
    "qk gradient": (
        lambda: ops.qk_rms_norm(
            X.view(4, 2, 32), X.view(4, 2, 32) + 1, GAIN[:32].clone().requires_grad_(), GAIN[:32]
        ),
        ValueError,
        "no backward",
    ),
    "scale shape": (
        lambda: ops.rms_norm_fp8(X, GAIN, EPS, torch.ones(2)),
        ValueError,
        "one element",
    ),
    "scale dtype": (
        lambda: ops.rms_norm_fp8(X, GAIN, EPS, torch.ones(1).half()),
        TypeError,
        "scale must be float32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_refused_through_the_operator_too() -> None:
    with pytest.raises(TypeError, match="gamma must be float32"):
        torch.ops.gemma_fold.rms_norm(X, GAIN.bfloat16(), EPS)


def test_reference_backward_is_autograd() -> None:
    x, gain = rows((5, 33), torch.float32, 14, "cpu"), gamma(33, 15, "cpu")
    grad = rows((5, 33), torch.float32, 16, "cpu")
    x.requires_grad_()
    gain.requires_grad_()
    want = torch.autograd.grad(reference.rms_norm(x, gain, EPS), (x, gain), grad)
    got = reference.rms_norm_backward(grad, x.detach(), gain.detach(), EPS)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when it is imported, so those tests have their own process."""
    pytest.importorskip("triton")
    tests = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *KERNELS],
        cwd=tests,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tests.parents[1])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout
