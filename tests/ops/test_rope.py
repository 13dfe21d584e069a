"""q and k norm with rotary embedding on CPU: the models' own code as oracle, and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from norm_checks import exact_norm, exact_rope, fused_qkv, gamma, rows, table
from torch import Tensor

from gemma_fold import ops

EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def models_norm(size: int, dtype: torch.dtype, seed: int) -> tuple[torch.nn.Module, Tensor]:
    """Gemma 3's own norm, and its folded gain."""
    gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    norm = gemma3.Gemma3RMSNorm(size, EPS).to(dtype).requires_grad_(False)
    norm.weight.copy_(rows((size,), torch.float32, seed, "cpu"))
    return norm, 1.0 + norm.weight.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("model", "rotary_dim"), (("gemma3", 256), ("qwen3_next", 64)))
def test_bit_identical_to_the_models_attention(
    model: str, rotary_dim: int, dtype: torch.dtype
) -> None:
    """Batched, one row of cosines and sines a token, in the dtype of the model."""
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    (q_norm, q_gain), (k_norm, k_gain) = (models_norm(256, dtype, seed) for seed in (1, 2))
    q, k = rows((2, 5, 4, 256), dtype, 3, "cpu"), rows((2, 5, 1, 256), dtype, 4, "cpu")
    cos_sin = table(10, rotary_dim, dtype, "cpu").view(2, 5, rotary_dim)
    cos, sin = (half.repeat(1, 1, 2) for half in cos_sin.chunk(2, dim=-1))
    want = modeling.apply_rotary_pos_emb(
        q_norm(q.transpose(1, 2)), k_norm(k.transpose(1, 2)), cos, sin
    )
    ops.qk_rms_norm_rope(q, k, q_gain, k_gain, cos_sin, None, EPS)
    assert torch.equal(q.transpose(1, 2), want[0])
    assert torch.equal(k.transpose(1, 2), want[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_identical_to_gptj_pairs(dtype: torch.dtype) -> None:
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    norm, gain = models_norm(128, dtype, 5)
    _, q, k = fused_qkv(6, (3, 2, 128), dtype, "cpu")
    cos_sin = table(6, 64, dtype, "cpu")
    cos, sin = (half[None] for half in cos_sin.chunk(2, dim=-1))
    want = []
    for heads in (q, k):
        normed = norm(heads)
        turned = gptj.apply_rotary_pos_emb(normed[None, ..., :64], sin, cos)[0]
        want.append(torch.cat((turned, normed[..., 64:]), dim=-1))
    ops.qk_rms_norm_rope(q, k, gain, gain, cos_sin, None, EPS, interleaved=True)
    assert torch.equal(q, want[0])
    assert torch.equal(k, want[1])


@pytest.mark.parametrize("interleaved", (False, True))
def test_an_fp32_table_rounds_once_after_the_norm(interleaved: bool) -> None:
    qkv, q, k = fused_qkv(7, (4, 2, 64), torch.bfloat16, "cpu")
    untouched = qkv[:, -128:].clone()
    gain, cos_sin = gamma(64, 6, "cpu"), table(100, 48, torch.float32, "cpu")
    positions = torch.tensor([99, 0, 5, 5, 98, 1, 50])
    want = [
        exact_rope(ops.rms_norm(heads, gain, EPS), cos_sin[positions], interleaved)
        for heads in (q, k)
    ]
    ops.qk_rms_norm_rope(q, k, gain, gain, cos_sin, positions.int(), EPS, interleaved=interleaved)
    for got, exact in zip((q, k), want, strict=True):
        # One rounding to bf16: half a unit, and what fp32 adds to it.
        torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-5)
    assert torch.equal(qkv[:, -128:], untouched)


def test_float64_agrees_in_fp32() -> None:
    _, q, k = fused_qkv(5, (2, 1, 96), torch.float32, "cpu")
    gain, cos_sin = gamma(96, 7, "cpu"), table(5, 96, torch.float32, "cpu")
    want = [exact_rope(exact_norm(heads, gain, EPS), cos_sin, False) for heads in (q, k)]
    ops.qk_rms_norm_rope(q, k, gain, gain, cos_sin, None, EPS)
    for got, exact in zip((q, k), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_position_outside_the_table_gives_nan() -> None:
    _, q, k = fused_qkv(4, (2, 1, 64), torch.float32, "cpu")
    gain = gamma(64, 8, "cpu")
    normed = ops.rms_norm(q, gain, EPS)
    positions = torch.tensor([-1, 0, 9, 10])
    ops.qk_rms_norm_rope(q, k, gain, gain, table(10, 16, torch.float32, "cpu"), positions, EPS)
    for heads in (q, k):
        assert heads[[0, 3], :, :16].isnan().all()
        assert not heads[[1, 2]].isnan().any()
    assert torch.equal(q[..., 16:], normed[..., 16:])


@pytest.mark.slow
@pytest.mark.parametrize("given", (False, True))
def test_the_operator_passes_opcheck(given: bool) -> None:
    positions = torch.tensor([3, 1, 2, 0]) if given else None
    _, q, k = fused_qkv(4, (2, 1, 64), torch.float32, "cpu")
    gain, cos_sin = gamma(64, 9, "cpu"), table(4, 32, torch.float32, "cpu")
    rest = (gain, gain, cos_sin, positions, EPS, given)
    torch.library.opcheck(torch.ops.gemma_fold.qk_rms_norm_rope, (q, k, *rest))
    torch.library.opcheck(torch.ops.gemma_fold.qk_rms_norm_rope_, (q.clone(), k.clone(), *rest))


def test_traces_without_graph_breaks_or_recompilation() -> None:
    gain, cos_sin = gamma(16, 10, "cpu"), table(64, 16, torch.bfloat16, "cpu")
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return module.forward

    def attention(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (x * 1).view(-1, 4, 16).split([3, 1], dim=1)
        ops.qk_rms_norm_rope(q, k, gain, gain, cos_sin, positions)
        return q, k

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=count)
    for tokens in (5, 2, 40):
        args = rows((tokens, 64), torch.bfloat16, tokens, "cpu"), torch.arange(tokens)
        for got, want in zip(compiled(*args), attention(*args), strict=True):
            assert torch.equal(got, want)
    assert graphs == 1


Q, K = torch.zeros(4, 2, 32), torch.zeros(4, 1, 32)
GAIN, TABLE, AT = torch.ones(32), torch.zeros(8, 32), torch.arange(4)
REFUSED: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "half table": ({"cos_sin": TABLE.half()}, TypeError, "cos_sin must be float32"),
    "odd rotary_dim": ({"cos_sin": TABLE[:, :31]}, ValueError, "even and at most the head_dim"),
    "no rotary_dim": ({"cos_sin": TABLE[:, :0]}, ValueError, "even and at most the head_dim"),
    "wide rotary_dim": ({"cos_sin": torch.zeros(8, 34)}, ValueError, "at most the head_dim of 32"),
    "table of three dimensions": (
        {"cos_sin": TABLE.view(2, 4, 32)},
        ValueError,
        "indexed by positions",
    ),
    "empty table": ({"cos_sin": TABLE[:0]}, ValueError, "indexed by positions"),
    "table elsewhere": ({"cos_sin": TABLE.to("meta")}, ValueError, "cos_sin is on meta"),
    "rows that are not tokens": ({"positions": None}, ValueError, r"\[4, 'rotary_dim'\]"),
    "float positions": ({"positions": AT.float()}, TypeError, "int32 or int64"),
    "short positions": ({"positions": AT[:3]}, ValueError, r"positions must be \[4\]"),
    "strided positions": ({"positions": torch.arange(8)[::2]}, ValueError, "contiguous"),
    "positions elsewhere": ({"positions": AT.to("meta")}, ValueError, "positions is on meta"),
    "short gamma": ({"k_gamma": GAIN[:31]}, ValueError, "k_gamma must have shape"),
    "k aliases q": ({"k": Q[:, :1]}, ValueError, "share memory"),
    "gradient": ({"q_gamma": torch.ones(32, requires_grad=True)}, ValueError, "no backward"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case: str) -> None:
    changed, error, message = REFUSED[case]
    good: dict[str, object] = {
        "q": Q, "k": K, "q_gamma": GAIN, "k_gamma": GAIN, "cos_sin": TABLE, "positions": AT
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.qk_rms_norm_rope(**{**good, **changed})  # type: ignore[arg-type]
