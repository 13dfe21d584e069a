"""q and k norm with rotary embedding on a GPU, over the grid of heads and dtypes."""

from __future__ import annotations

import pytest
import reference
import torch
from norm_checks import exact_norm, exact_rope, fused_qkv, gamma, pair_sizes, rows, table, ulps
from torch import Tensor

from gemma_fold import ops

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# (q heads, k heads, head_dim), rotary_dim
SHAPES = (
    ((32, 16, 128), 128),
    ((4, 1, 256), 256),
    ((16, 2, 256), 64),
    ((8, 8, 64), 64),
    ((3, 2, 96), 96),
    ((2, 1, 80), 20),
    ((2, 1, 512), 512),
    ((2, 1, 1024), 128),
    ((1, 1, 7), 2),
)
EPS = 1e-6
LIMIT = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 8.0}


def operands(
    tokens: int, heads: tuple[int, int, int], rotary_dim: int, dtype: torch.dtype, wide: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor], Tensor, Tensor]:
    """(qkv, q, k), (q gamma, k gamma), a table of 1,000 positions, and the tokens' positions."""
    gains = gamma(heads[2], 31, "cuda"), gamma(heads[2], 32, "cuda")
    cos_sin = table(1000, rotary_dim, torch.float32 if wide else dtype, "cuda")
    generator = torch.Generator().manual_seed(33)
    positions = torch.randint(0, 1000, (tokens,), generator=generator).cuda()
    return fused_qkv(tokens, heads, dtype, "cuda"), gains, cos_sin, positions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide_table", (False, True))
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize(("heads", "rotary_dim"), SHAPES)
@pytest.mark.parametrize("tokens", (1, 9, 700))
def test_equals_the_unfused_sequence(
    tokens: int,
    heads: tuple[int, int, int],
    rotary_dim: int,
    interleaved: bool,
    wide_table: bool,
    dtype: torch.dtype,
) -> None:
    (qkv, q, k), gains, cos_sin, positions = operands(tokens, heads, rotary_dim, dtype, wide_table)
    rest = qkv[:, -heads[1] * heads[2] :].clone()
    before = q.clone(), k.clone()
    normed = q.clone(), k.clone()
    ops.qk_rms_norm(*normed, *gains, EPS)
    ops.qk_rms_norm_rope(q, k, *gains, cos_sin, positions, EPS, interleaved=interleaved)
    for got, x, y, gain in zip((q, k), before, normed, gains, strict=True):
        # Every bit: the same norm, and torch's own rounding of products and sum.
        assert torch.equal(got, reference.rotate(y, cos_sin, positions, interleaved))
        stock = reference.rms_norm(x, gain, EPS)
        size = pair_sizes(stock, rotary_dim, interleaved)
        stock = reference.rotate(stock, cos_sin, positions, interleaved)
        # A norm that rounds the other way moves both products and what they round to.
        assert ulps(got, stock, dtype, size) <= 2 * LIMIT[dtype]
        exact = exact_rope(exact_norm(x, gain, EPS), cos_sin[positions], interleaved)
        if tokens > 100:  # enough elements for an average
            error, stock_error = ((z.double() - exact).norm().item() for z in (got, stock))
            # In fp32 both sum to the last bit or two, each in its own order.
            assert error <= (1.25 if dtype == torch.float32 else 1.01) * stock_error
    assert torch.equal(qkv[:, -heads[1] * heads[2] :], rest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", ((32, 16, 128), (4, 1, 256), (3, 2, 96)))
def test_a_row_does_not_depend_on_how_many_there_are(
    heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    (whole, q, k), gains, cos_sin, positions = operands(900, heads, heads[2], dtype, False)
    start = whole.clone()
    ops.qk_rms_norm_rope(q, k, *gains, cos_sin, positions, EPS)
    for tokens in (1, 2, 37, 300):
        part = start[:tokens].clone().unflatten(1, (-1, heads[2]))
        q, k = part[:, : heads[0]], part[:, heads[0] : heads[0] + heads[1]]
        ops.qk_rms_norm_rope(q, k, *gains, cos_sin, positions[:tokens], EPS)
        assert torch.equal(part.flatten(1), whole[:tokens])


@pytest.mark.parametrize("interleaved", (False, True))
def test_layouts(interleaved: bool) -> None:
    """A gate between the heads, odd strides, unaligned tables and positions, batches, int32."""
    _, gains, cos_sin, positions = operands(12, (4, 2, 64), 64, torch.bfloat16, False)
    q, k = (rows((12, n, 64), torch.bfloat16, n, "cuda") for n in (4, 2))
    want = torch.ops.gemma_fold.qk_rms_norm_rope(q, k, *gains, cos_sin, positions, EPS, interleaved)

    def check(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor | None) -> None:
        ops.qk_rms_norm_rope(q, k, *gains, cos_sin, positions, EPS, interleaved=interleaved)
        for got, exact in zip((q, k), want, strict=True):
            # Heads that miss 16-byte alignment are summed in another order: a last bit of a norm.
            torch.testing.assert_close(got.reshape(exact.shape), exact, rtol=2**-7, atol=2**-7)

    gated = torch.zeros(12, 4, 128, device="cuda", dtype=torch.bfloat16)
    gated[..., :64] = q
    check(gated[..., :64], k.clone(), cos_sin, positions)
    assert not gated[..., 64:].any()
    odd = torch.zeros(12, 6 * 64 + 3, device="cuda", dtype=torch.bfloat16)
    parts = odd[:, 3:].unflatten(1, (6, 64))
    parts[:, :4], parts[:, 4:] = q, k
    check(parts[:, :4], parts[:, 4:], cos_sin, positions)
    shifted = torch.zeros(1000, 67, device="cuda", dtype=torch.bfloat16)
    shifted[:, 3:] = cos_sin
    check(q.clone(), k.clone(), shifted[:, 3:], positions)
    late = torch.zeros(13, device="cuda", dtype=torch.int32)
    late[1:] = positions
    check(q.clone(), k.clone(), cos_sin, late[1:])
    check(q.clone(), k.clone(), cos_sin[positions], None)
    check(
        q.clone().unflatten(0, (3, 4)),
        k.clone().unflatten(0, (3, 4)),
        cos_sin,
        positions.view(3, 4),
    )


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("kind", (torch.int32, torch.int64))
def test_a_position_outside_the_table_reads_nothing(kind: torch.dtype, interleaved: bool) -> None:
    (_, q, k), gains, cos_sin, _ = operands(5, (4, 2, 128), 64, torch.bfloat16, False)
    positions = torch.tensor([0, -1, 1000, torch.iinfo(kind).max, 999], dtype=kind).cuda()
    ops.qk_rms_norm_rope(q, k, *gains, cos_sin, positions, EPS, interleaved=interleaved)
    for heads in (q, k):
        assert heads[1:4, :, :64].isnan().all()
        assert not heads[1:4, :, 64:].isnan().any() and not heads[[0, 4]].isnan().any()


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_nan_and_infinity_propagate(value: float) -> None:
    (_, q, k), gains, cos_sin, positions = operands(4, (2, 1, 128), 128, torch.bfloat16, False)
    q[1, 0, 5] = value
    want = reference.qk_rms_norm_rope(q, k, *gains, cos_sin, positions, EPS, False)
    ops.qk_rms_norm_rope(q, k, *gains, cos_sin, positions, EPS)
    for got, exact in zip((q, k), want, strict=True):
        assert torch.equal(got.isnan(), exact.isnan())


def test_no_tokens() -> None:
    (_, q, k), gains, cos_sin, positions = operands(0, (4, 2, 128), 128, torch.bfloat16, False)
    ops.qk_rms_norm_rope(q, k, *gains, cos_sin, positions, EPS)
    ops.qk_rms_norm_rope(q, k, *gains, cos_sin[:0], None, EPS)


def test_more_than_two_to_the_31_elements() -> None:
    tokens = 2**31 // 8192 + 5
    heads = torch.empty(tokens, 64, 128, device="cuda", dtype=torch.bfloat16)
    heads[-8:] = rows((8, 64, 128), torch.bfloat16, 34, "cuda")
    _, (gain, _), cos_sin, _ = operands(1, (1, 1, 128), 128, torch.bfloat16, True)
    positions = torch.arange(tokens, device="cuda") % 1000
    tail = heads[-8:].clone()
    ops.qk_rms_norm_rope(tail[:, :48], tail[:, 48:], gain, gain, cos_sin, positions[-8:].clone())
    ops.qk_rms_norm_rope(heads[:, :48], heads[:, 48:], gain, gain, cos_sin, positions)
    assert torch.equal(heads[-8:], tail)


def test_cuda_graph_replays_at_new_positions() -> None:
    (qkv, q, k), gains, cos_sin, positions = operands(16, (4, 2, 128), 128, torch.bfloat16, False)
    ops.qk_rms_norm_rope(q, k, *gains, cos_sin, positions, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.qk_rms_norm_rope(q, k, *gains, cos_sin, positions, EPS)
    fresh = rows(tuple(qkv.shape), torch.bfloat16, 35, "cuda")
    qkv.copy_(fresh)
    positions.add_(1).remainder_(1000)
    graph.replay()
    parts = fresh.unflatten(1, (-1, 128))
    ops.qk_rms_norm_rope(parts[:, :4], parts[:, 4:6], *gains, cos_sin, positions.clone(), EPS)
    assert torch.equal(qkv, fresh)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, on the first compile
def test_compiles_whole_and_once_for_every_token_count() -> None:
    _, gains, cos_sin, _ = operands(1, (6, 3, 128), 128, torch.bfloat16, False)

    def attention(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = (x * 2).view(-1, 12, 128).split([6, 3, 3], dim=1)
        ops.qk_rms_norm_rope(q, k, *gains, cos_sin, positions)
        return q, k

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for tokens in (8, 3, 64, 333):
        x = rows((tokens, 1536), torch.bfloat16, tokens, "cuda")
        args = x, torch.arange(tokens, device="cuda")
        for got, want in zip(compiled(*args), attention(*args), strict=True):
            assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("given", (False, True))
def test_the_operator_passes_opcheck(given: bool) -> None:
    (_, q, k), gains, cos_sin, positions = operands(5, (4, 2, 64), 64, torch.bfloat16, given)
    held = (cos_sin, positions) if given else (cos_sin[:5], None)
    rest = (*gains, *held, EPS, given)
    torch.library.opcheck(torch.ops.gemma_fold.qk_rms_norm_rope, (q, k, *rest))
    torch.library.opcheck(torch.ops.gemma_fold.qk_rms_norm_rope_, (q.clone(), k.clone(), *rest))


def test_operands_on_different_devices_are_refused() -> None:
    (_, q, k), gains, cos_sin, positions = operands(5, (4, 2, 64), 64, torch.bfloat16, False)
    with pytest.raises(ValueError, match="cos_sin is on cpu"):
        ops.qk_rms_norm_rope(q, k, *gains, cos_sin.cpu(), positions)
    with pytest.raises(ValueError, match="positions is on cpu"):
        ops.qk_rms_norm_rope(q, k, *gains, cos_sin, positions.cpu())
