"""The Triton kernels on a GPU, over the whole grid of shapes and dtypes. Run with ``-m gpu``."""

from __future__ import annotations

import pytest
import reference
import torch
from batch_checks import check_rows_alone
from norm_checks import check_in_place, exact_norm, gamma, rows, ulps
from torch import Tensor

from gemma_fold import ops
from gemma_fold.ops import launch
from gemma_fold.ops.operators import base

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HIDDEN = (1, 7, 64, 100, 640, 641, 1152, 2560, 3840, 4096, 5376, 8192, 12000, 16384)
EPS = 1e-6
# fp32 sums run in another order than the reference's; a few units is what that may cost.
LIMIT = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 8.0}


def operands(tokens: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = rows((tokens, hidden), dtype, 1, "cuda")
    residual = rows((tokens, hidden), dtype, 2, "cuda")
    return x, residual, gamma(hidden, 3, "cuda"), gamma(hidden, 4, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("tokens", (1, 5, 64, 1030))
def test_equals_the_unfused_sequence(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    x, residual, post, pre = operands(tokens, hidden, dtype)
    normed = ops.rms_norm(x, post, EPS)
    assert normed.dtype == dtype
    assert ulps(normed, reference.rms_norm(x, post, EPS), dtype) <= LIMIT[dtype]

    y, total = ops.add_rms_norm(x, residual, pre, EPS)
    assert torch.equal(total, residual + x)
    assert torch.equal(y, ops.rms_norm(total, pre, EPS))
    assert ulps(y, reference.rms_norm(total, pre, EPS), dtype) <= LIMIT[dtype]

    y, total = ops.rms_norm_add_rms_norm(x, residual, post, pre, EPS, 1e-5)
    assert torch.equal(total, residual + normed)
    assert torch.equal(y, ops.rms_norm(total, pre, 1e-5))
    assert ulps(y, reference.rms_norm(total, pre, 1e-5), dtype) <= LIMIT[dtype]
    check_in_place(x, residual, post, pre, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("tokens", (1, 64, 1030))
def test_a_zero_centred_weight_gives_the_bits_of_its_gamma(
    tokens: int, hidden: int, stored: torch.dtype, dtype: torch.dtype
) -> None:
    x, weight = rows((tokens, hidden), dtype, 1, "cuda"), gamma(hidden, 3, "cuda").to(stored)
    got = ops.rms_norm_zero_centered(x, weight, EPS)
    if hidden * x.element_size() % 16:  # the sum over a row may run in another order
        assert ulps(got, exact_norm(x, 1.0 + weight.double(), EPS), dtype) <= LIMIT[dtype]
    else:
        assert torch.equal(got, ops.rms_norm(x, 1.0 + weight.float(), EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", (512, 640, 1152, 2560, 3840, 5376, 8192))
def test_a_row_has_the_same_bits_in_every_batch(hidden: int, dtype: torch.dtype) -> None:
    check_rows_alone(hidden, dtype, "cuda", 2051, (1, 2, 8, 17, 64, 129, 512, 513, 1025))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", (640, 1152, 5376, 8192))
def test_no_further_from_float64_than_the_stock_sequence(hidden: int, dtype: torch.dtype) -> None:
    x, residual, post, pre = operands(600, hidden, dtype)
    stock = reference.rms_norm_add_rms_norm(x, residual, post, pre, EPS, EPS)
    ours = ops.rms_norm_add_rms_norm(x, residual, post, pre, EPS, EPS)
    total = residual.double() + exact_norm(x, post, EPS)
    for got, other, exact in zip(ours, stock, (exact_norm(total, pre, EPS), total), strict=True):
        ours_off = (got.double() - exact).norm().item()
        stock_off = (other.double() - exact).norm().item()
        # In fp32 both sum to the last bit or two, each in its own order.
        assert ours_off <= (1.05 if dtype == torch.float32 else 1.001) * stock_off


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", (64, 641, 640, 1152, 2560, 4096, 5376, 8192, 16384))
def test_a_row_does_not_depend_on_how_many_there_are(hidden: int, dtype: torch.dtype) -> None:
    x, residual, post, pre = operands(2100, hidden, dtype)

    def all_ops(n: int) -> list[Tensor]:
        a, r = x[:n], residual[:n]
        return [
            ops.rms_norm(a, post, EPS),
            *ops.add_rms_norm(a, r, post, EPS),
            *ops.rms_norm_add_rms_norm(a, r, post, pre, EPS, EPS),
            *ops.rms_norm_fp8(a, post, EPS),
        ]

    whole = all_ops(2100)
    for n in (1, 2, 37, 200, 300, 600, 1000):
        for part, full in zip(all_ops(n), whole, strict=True):
            assert torch.equal(part.view(torch.uint8), full[:n].view(torch.uint8))


@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", (64, 641, 640, 1152, 5376, 8192, 16384))
def test_fp8_is_the_rounded_norm_quantised(
    hidden: int, dtype: torch.dtype, per_token: bool
) -> None:
    x, residual, post, pre = operands(70, hidden, dtype)
    x[3] = 0.0
    residual[3] = 0.0
    given = None if per_token else torch.tensor([0.013], device="cuda")
    y, total = ops.rms_norm_add_rms_norm(x, residual, post, pre, EPS, EPS)
    pairs = [
        (ops.rms_norm(x, post, EPS), ops.rms_norm_fp8(x, post, EPS, given)),
        (
            ops.add_rms_norm(x, residual, post, EPS)[0],
            ops.add_rms_norm_fp8(x, residual, post, EPS, given),
        ),
        (y, ops.rms_norm_add_rms_norm_fp8(x, residual, post, pre, EPS, EPS, given)),
    ]
    for normed, (quantised, scale, *rest) in pairs:
        assert quantised.dtype == torch.float8_e4m3fn
        if per_token:
            assert scale.shape == (70, 1)
            torch.testing.assert_close(
                scale, reference.quantize(normed, None)[1], rtol=3e-7, atol=0
            )
        else:
            assert scale is given
        want = reference.quantize(normed, scale)[0]
        assert torch.equal(quantised.view(torch.uint8), want.view(torch.uint8))
        for new_residual in rest:
            assert new_residual.dtype == dtype
    assert torch.equal(pairs[2][1][2], total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads", ((32, 16, 128), (4, 1, 256), (3, 2, 96), (8, 8, 64), (2, 1, 512), (1, 1, 7))
)
@pytest.mark.parametrize("tokens", (1, 9, 700))
def test_qk_in_place_on_a_fused_tensor(
    tokens: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    q_heads, k_heads, size = heads
    sizes = [q_heads * size, k_heads * size, k_heads * size]
    qkv = rows((tokens, sum(sizes)), dtype, 5, "cuda")
    want = qkv.clone()
    gains = gamma(size, 6, "cuda"), gamma(size, 7, "cuda")

    def views(tensor: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = tensor.split(sizes, dim=1)
        return q.view(tokens, q_heads, size), k.view(tokens, k_heads, size)

    ops.qk_rms_norm(*views(qkv), *gains, EPS)
    reference.qk_rms_norm(*views(want), *gains, EPS)
    assert ulps(qkv, want, dtype) <= LIMIT[dtype]
    assert torch.equal(qkv[:, -sizes[2] :], want[:, -sizes[2] :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", ((32, 16, 128), (4, 1, 256), (3, 2, 96), (2, 1, 512)))
def test_a_head_does_not_depend_on_how_many_there_are(
    heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    q_heads, k_heads, size = heads
    q = rows((1500, q_heads * size), dtype, 5, "cuda").view(1500, q_heads, size)
    k = rows((1500, k_heads * size), dtype, 6, "cuda").view(1500, k_heads, size)
    gains = gamma(size, 6, "cuda"), gamma(size, 7, "cuda")

    def normed(n: int) -> tuple[Tensor, Tensor]:
        return torch.ops.gemma_fold.qk_rms_norm(q[:n], k[:n], *gains, EPS)

    whole = normed(1500)
    for n in (1, 2, 37, 300):
        for part, full in zip(normed(n), whole, strict=True):
            assert torch.equal(part, full[:n])


def test_strides_offsets_and_layouts() -> None:
    wide = rows((50, 3 * 640 + 8), torch.bfloat16, 8, "cuda")
    gain = gamma(640, 9, "cuda")
    views = {
        "aligned columns": wide[:, 640:1280],
        "unaligned columns": wide[:, 3:643],
        "every other row": wide[::2, :640],
        "one row repeated": wide[:1, :640].expand(20, 640),
        "leading dimensions": wide[:, :640].unflatten(0, (5, 10)),
        "transposed heads": wide[:, :1280].contiguous().view(5, 10, 2, 640).transpose(1, 2),
        "vector": wide[0, :640],
        "heads of a fused tensor": wide[:, 640:1920].unflatten(1, (2, 640)),
        "unaligned heads": wide[:, 1:1281].unflatten(1, (2, 640)),
        "gated heads": wide[:, :1280].unflatten(1, (2, 640))[:, ::2],
    }
    for name, view in views.items():
        got = ops.rms_norm(view, gain, EPS)
        assert got.shape == view.shape, name
        want = ops.rms_norm(view.contiguous(), gain, EPS)
        assert torch.equal(got, want), name
        twice = ops.rms_norm(view, gain, EPS)
        assert torch.equal(twice, want), name
    shifted = torch.empty(641, device="cuda")[1:].copy_(gain)
    assert torch.equal(ops.rms_norm(wide[:, :640], shifted, EPS), ops.rms_norm(wide[:, :640], gain))
    left, right = wide[:, :640], wide[:, 640:1280]
    y, total = ops.add_rms_norm(left, right, gain, EPS)
    assert torch.equal(total, right + left)
    assert torch.equal(y, ops.add_rms_norm(left.contiguous(), right.contiguous(), gain, EPS)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_public_launch_gives_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (*operands(33, 3840, dtype), EPS, EPS)
    monkeypatch.setattr(base, "_plans", {})
    ops.rms_norm_add_rms_norm(*given)
    direct = ops.rms_norm_add_rms_norm(*given)
    assert any(plan.ready for plan in base._plans.values() if plan is not None)

    monkeypatch.setattr(base, "_plans", {})
    monkeypatch.setattr(launch, "takes_addresses", lambda *launcher: False)
    for _ in range(2):
        public = ops.rms_norm_add_rms_norm(*given)
        assert all(map(torch.equal, public, direct))
    assert not any(plan.ready for plan in base._plans.values() if plan is not None)


def test_no_rows() -> None:
    x = torch.empty(0, 640, device="cuda", dtype=torch.bfloat16)
    gain = gamma(640, 1, "cuda")
    assert ops.rms_norm(x, gain).shape == (0, 640)
    assert ops.add_rms_norm(x, x, gain)[1].shape == (0, 640)
    assert ops.rms_norm_fp8(x, gain)[1].shape == (0, 1)
    ops.qk_rms_norm(x.view(0, 5, 128), x.view(0, 5, 128), gain[:128], gain[:128])


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_propagate(value: float, dtype: torch.dtype) -> None:
    x, residual, post, pre = operands(6, 1152, dtype)
    x[2, 5] = value
    residual[4, 1151] = value
    pairs = [
        ((ops.rms_norm(x, post),), (reference.rms_norm(x, post, EPS),)),
        (ops.add_rms_norm(x, residual, post), reference.add_rms_norm(x, residual, post, EPS)),
        (
            ops.rms_norm_add_rms_norm(x, residual, post, pre),
            reference.rms_norm_add_rms_norm(x, residual, post, pre, EPS, EPS),
        ),
        (ops.rms_norm_fp8(x, post), reference.quantize(reference.rms_norm(x, post, EPS), None)),
    ]
    for got, want in pairs:
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.float().isnan(), b.float().isnan())
            assert torch.equal(a.float().isinf(), b.float().isinf())


def test_more_than_two_to_the_31_elements() -> None:
    hidden, tokens = 8192, 2**31 // 8192 + 5
    x = torch.empty(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    tail = rows((8, hidden), torch.bfloat16, 10, "cuda")
    x[-8:] = tail
    gain = gamma(hidden, 11, "cuda")
    assert torch.equal(ops.rms_norm(x, gain)[-8:], ops.rms_norm(tail, gain))
    y, total = ops.add_rms_norm(x, x, gain)
    assert torch.equal(total[-8:], tail + tail)
    del y, total
    heads = x.view(tokens, 64, 128)
    want = ops.rms_norm(tail.view(8, 64, 128), gain[:128])
    ops.qk_rms_norm(heads[:, :48], heads[:, 48:], gain[:128], gain[:128])
    assert ulps(heads[-8:], want, torch.bfloat16) <= 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", (100, 641, 1152, 5376, 16384))
def test_backward(hidden: int, dtype: torch.dtype) -> None:
    x, grad, gain, _ = operands(300, hidden, dtype)
    x.requires_grad_()
    gain.requires_grad_()
    ops.rms_norm(x, gain, EPS).backward(grad)
    x64 = x.detach().double().requires_grad_()
    gain64 = gain.detach().double().requires_grad_()
    exact_norm(x64, gain64, EPS).backward(grad.double())
    assert gain.grad is not None and gain.grad.dtype == torch.float32
    torch.testing.assert_close(gain.grad.double(), gain64.grad, rtol=1e-4, atol=1e-3)
    error = (x.grad.double() - x64.grad).norm() / x64.grad.norm()
    assert error < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}[dtype]


def test_gradients_pass_through_the_fused_operators() -> None:
    x, residual, post, pre = (t.requires_grad_() for t in operands(20, 640, torch.float32))
    y, total = ops.rms_norm_add_rms_norm(x, residual, post, pre)
    (y.sum() + total.square().sum()).backward()
    others = [t.detach().double().requires_grad_() for t in (x, residual, post, pre)]
    total64 = others[1] + exact_norm(others[0], others[2], EPS)
    (exact_norm(total64, others[3], EPS).sum() + total64.square().sum()).backward()
    for got, want in zip((x, residual, post, pre), others, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-3, atol=1e-3)


def test_cuda_graph_replays_on_new_data() -> None:
    x, residual, post, pre = operands(16, 1152, torch.bfloat16)
    q = torch.randn(16, 6, 128, device="cuda", dtype=torch.bfloat16)
    ops.rms_norm_add_rms_norm(x, residual, post, pre)
    ops.add_rms_norm_(x.clone(), residual.clone(), pre)
    ops.qk_rms_norm(q[:, :4], q[:, 4:], post[:128], pre[:128])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, total = ops.rms_norm_add_rms_norm(x, residual, post, pre)
        z = ops.rms_norm(y, pre)
        ops.add_rms_norm_(x, residual, pre)
        ops.qk_rms_norm(q[:, :4], q[:, 4:], post[:128], pre[:128])
    fresh = [rows((16, 1152), torch.bfloat16, seed, "cuda") for seed in (20, 21)]
    x.copy_(fresh[0])
    residual.copy_(fresh[1])
    post.add_(0.5)  # a live weight update lands in the captured storage
    heads = q.copy_(torch.randn_like(q)).clone()
    graph.replay()
    ops.qk_rms_norm(heads[:, :4], heads[:, 4:], post[:128], pre[:128])
    want = ops.rms_norm_add_rms_norm(*fresh, post, pre)
    assert torch.equal(y, want[0]) and torch.equal(total, want[1])
    assert torch.equal(z, ops.rms_norm(want[0], pre)) and torch.equal(q, heads)
    want = ops.add_rms_norm(*fresh, pre)
    assert torch.equal(x, want[0]) and torch.equal(residual, want[1])


def test_a_gamma_written_by_the_kernel_before_is_seen() -> None:
    x = rows((1, 8192), torch.bfloat16, 12, "cuda")
    gain = gamma(8192, 13, "cuda")
    want = [ops.rms_norm(x, gain + step) for step in range(50)]
    for step in range(50):
        assert torch.equal(ops.rms_norm(x, gain + step), want[step])


@pytest.mark.parametrize("tokens", (1, 100, 1000))
def test_a_gamma_written_inside_a_graph_is_seen(tokens: int) -> None:
    """Few rows read gamma before the kernel before them has ended: it must have been written."""
    x, residual, gain, ones = operands(tokens, 8192, torch.bfloat16)
    ones.fill_(1.0)
    gains = [gain + step for step in range(12)]
    made = [ops.rms_norm(one[None], ones, EPS)[0] for one in gains]  # fp32, a gamma itself
    want = [
        ops.rms_norm_add_rms_norm(x, residual, one, other)
        for one, other in zip(gains, made, strict=True)
    ]
    torch.cuda.synchronize()
    results = []

    def chain() -> None:
        for one in gains:
            gain.copy_(one)
            y = ops.rms_norm(x, gain, EPS)
            late = ops.rms_norm(gain[None], ones, EPS)[0]
            results.append((y, *ops.rms_norm_add_rms_norm(x, residual, gain, late)))

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for _ in range(50):
        graph.replay()
        wanted = zip(results, [*want, *want], [*gains, *gains], strict=True)
        for (y, *pair), expected, one in wanted:
            assert torch.equal(y, ops.rms_norm(x, one, EPS))
            assert all(torch.equal(got, whole) for got, whole in zip(pair, expected, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, on the first compile
def test_compiles_whole_and_once_for_every_token_count() -> None:
    gain, other = gamma(1152, 14, "cuda"), gamma(128, 15, "cuda")

    def layer(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        y, total = ops.rms_norm_add_rms_norm(x * 2, residual, gain, gain)
        q, k = (y * 1).view(-1, 9, 128).split([6, 3], dim=1)
        ops.qk_rms_norm(q, k, other, other)
        z, scale = ops.rms_norm_fp8(total, gain)
        return q, k, ops.rms_norm(total, gain), z, scale

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for tokens in (8, 3, 64, 333):
        x, residual, *_ = operands(tokens, 1152, torch.bfloat16)
        for got, want in zip(compiled(x, residual), layer(x, residual), strict=True):
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_operators_pass_opcheck() -> None:
    x, residual, post, pre = operands(5, 640, torch.bfloat16)
    heads = torch.randn(5, 6, 128, device="cuda")
    scale = torch.ones(1, device="cuda")
    table = torch.ops.gemma_fold
    torch.library.opcheck(table.rms_norm, (x.requires_grad_(), post.requires_grad_(), EPS))
    x, post = x.detach(), post.detach()
    torch.library.opcheck(table.add_rms_norm, (x, residual, post, EPS))
    torch.library.opcheck(table.rms_norm_add_rms_norm, (x, residual, post, pre, EPS, EPS))
    copies = x.clone(), residual.clone()
    torch.library.opcheck(table.add_rms_norm_, (*copies, post, EPS))
    torch.library.opcheck(table.rms_norm_add_rms_norm_, (*copies, post, pre, EPS, EPS))
    gains = (post[:128], pre[:128], EPS)
    torch.library.opcheck(table.qk_rms_norm, (heads[:, :4], heads[:, 4:], *gains))
    torch.library.opcheck(table.qk_rms_norm_, (heads[:, :4].clone(), heads[:, 4:].clone(), *gains))
    for given in (None, scale):
        torch.library.opcheck(table.rms_norm_fp8, (x, post, EPS, given))
        torch.library.opcheck(table.add_rms_norm_fp8, (x, residual, post, EPS, given))
        torch.library.opcheck(
            table.rms_norm_add_rms_norm_fp8, (x, residual, post, pre, EPS, EPS, given)
        )


def test_operands_on_different_devices_are_refused() -> None:
    x = torch.randn(2, 64, device="cuda")
    with pytest.raises(ValueError, match="gamma is on cpu"):
        ops.rms_norm(x, torch.ones(64))
    with pytest.raises(ValueError, match="residual is on cpu"):
        ops.add_rms_norm(x, x.cpu(), torch.ones(64, device="cuda"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_its_operands_are() -> None:
    x, gain = rows((4, 640), torch.bfloat16, 1, "cuda:0"), gamma(640, 2, "cuda:0")
    want = ops.rms_norm(x, gain)
    for _ in range(2):
        got = ops.rms_norm(x.to("cuda:1"), gain.to("cuda:1"))
        assert got.device.index == 1
        assert torch.equal(got.cpu(), want.cpu())
