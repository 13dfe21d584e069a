"""q and k norm, rotary embedding and the cache's write on CPU: models' code as oracle, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import cache_checks
import pytest
import torch
from cache_checks import EPS, FP8, LAYOUTS, Case, make
from torch import Tensor

from gemma_fold import ops

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("fp8", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_sequence_it_replaces(dtype: torch.dtype, layout: str, fp8: bool) -> None:
    for heads, rotary_dim in (((4, 2, 64), 64), ((3, 1, 80), 20)):
        cache_checks.check(make(21, heads, rotary_dim, dtype, "cpu", layout=layout, fp8=fp8))


@pytest.mark.parametrize("in_turn", (False, True))
@pytest.mark.parametrize("interleaved", (False, True))
def test_three_positions_a_token(interleaved: bool, in_turn: bool) -> None:
    for section in ((11, 11, 10), (24, 5, 3)):
        case = make(
            19, (4, 2, 256), 64, torch.bfloat16, "cpu",
            section=section, interleaved=interleaved, in_turn=in_turn,
        )  # fmt: skip
        cache_checks.check(case)


@pytest.mark.parametrize("in_turn", (False, True))
def test_positions_are_mixed_as_the_models_mix_them(in_turn: bool) -> None:
    """Qwen2-VL's sections, and Qwen3-VL's that take turns, on the angles of three positions."""
    case = make(
        9, (2, 1, 64), 64, torch.float32, "cpu", section=(14, 10, 8), in_turn=in_turn
    )  # fmt: skip
    cos, sin = (case.cos_sin[case.positions].chunk(2, dim=-1)[i] for i in (0, 1))
    if in_turn:
        model = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
        mix = getattr(model.Qwen3VLTextRotaryEmbedding, "recomposition_frequencies", None)
        if mix is None:
            pytest.skip("this version of transformers mixes positions elsewhere")
        settings = SimpleNamespace(mrope_section=case.section)
        want = [mix(settings, x.clone()).chunk(2, dim=-1)[0] for x in (cos, sin)]
    else:
        parts = [x.split(list(case.section or ()), dim=-1) for x in (cos, sin)]
        want = [torch.cat([part[i] for i, part in enumerate(x)], dim=-1) for x in parts]
    q, k, _ = (x.clone() for x in case.qkv_heads)
    ops.qk_rms_norm_rope(q, k, *case.gains, torch.cat(want, dim=-1), None, EPS)
    case.run()
    assert torch.equal(case.qkv_heads[0], q)


def test_a_position_outside_the_table_gives_nan_in_its_own_pairs() -> None:
    case = make(4, (2, 1, 64), 32, torch.float32, "cpu", section=(8, 4, 4))
    case.positions[1, 2] = -1
    case.run()
    q = case.qkv_heads[0]
    assert q[2, :, 8:12].isnan().all() and q[2, :, 24:28].isnan().all()
    assert q.isnan().sum() == 2 * 8


def test_nan_and_infinity_in_a_cache_of_e4m3() -> None:
    case = make(2, (1, 1, 8), 2, torch.float32, "cpu", fp8=True)
    v = case.qkv_heads[2]
    v[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -1e30])
    case.slots = torch.tensor([0, 1])
    case.run()
    found = case.caches[1][0, 0, 0].float()
    assert found[0].isnan() and found[1:3].tolist() == [448.0, -448.0]


@pytest.mark.parametrize("name", ("qk_rms_norm_rope_cache", "qk_rms_norm_rope_cache_"))
@pytest.mark.slow
def test_the_operators_pass_opcheck(name: str) -> None:
    case = make(5, (2, 1, 32), 16, torch.float32, "cpu")
    # Each in its own memory: opcheck compares what is mutated by whole tensors.
    apart = [x.clone() for x in (*case.qkv_heads, *case.gains)]
    caches = [x.clone() for x in case.caches]
    args = (
        *apart, case.cos_sin, case.positions, *caches, case.slots, None, None,
        EPS, False, 0, 0, 0, False,
    )  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.gemma_fold, name), args)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, on the first compile
def test_compiled_with_views_of_a_cache() -> None:
    case = make(40, (2, 1, 64), 64, torch.float32, "cpu", layout="hnd")
    for results, rooms in cache_checks.compiled(case, (5, 33, 40)):
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*rooms)


GOOD = make(4, (2, 2, 32), 32, torch.float32, "cpu")
KEY, VALUE = GOOD.caches
EIGHT = KEY.to(FP8)
ONE, TWO = torch.ones(1), torch.ones(2)
REPEATED = VALUE[:1].expand(4, -1, -1, -1)
REFUSED: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "batched": ({"v": GOOD.qkv_heads[2][None]}, ValueError, r"must both be \[tokens, heads"),
    "v of other heads": ({"v": GOOD.qkv_heads[2][:, :1]}, ValueError, "must both be"),
    "half v": ({"v": GOOD.qkv_heads[2].half()}, TypeError, "must match"),
    "no q heads": ({"q": GOOD.qkv_heads[0][:, :0]}, ValueError, r"q must be \[..., heads"),
    "v is q": ({"v": GOOD.qkv_heads[0]}, ValueError, "q and v share memory"),
    "half cache": ({"key_cache": KEY.half()}, TypeError, "key_cache must be torch.float32"),
    "e5m2": ({"key_cache": KEY.to(torch.float8_e5m2)}, TypeError, "float8_e4m3fn, not"),
    "bytes": ({"value_cache": VALUE.to(torch.uint8)}, TypeError, "value_cache must be"),
    "cache of a head": ({"key_cache": KEY[:, :, :1]}, ValueError, r"\[blocks, block_size, 2, 32\]"),
    "cache of two dimensions": ({"key_cache": KEY[0, 0]}, ValueError, r"or \[slots, 2, 32\]"),
    "cache of five": ({"key_cache": KEY[None]}, ValueError, r"or \[slots, 2, 32\]"),
    "no blocks": ({"key_cache": KEY[:0]}, ValueError, r"not \[0, 4, 2, 32\]"),
    "cache elsewhere": ({"key_cache": KEY.to("meta")}, ValueError, "key_cache is on meta"),
    "columns apart": (
        {"key_cache": KEY.mT.contiguous().mT}, ValueError, "key_cache with strides .* heads"
    ),
    "fewer values": ({"value_cache": VALUE[:1]}, ValueError, "must match"),
    "strides differ": (
        {"value_cache": VALUE.transpose(1, 2).contiguous().transpose(1, 2)},
        ValueError,
        "the same strides",
    ),
    "one cache": ({"value_cache": KEY}, ValueError, "key_cache and value_cache share memory"),
    "overlapping caches": (
        {"key_cache": GOOD.room.flatten(0, 1)[:3], "value_cache": GOOD.room.flatten(0, 1)[1:4]},
        ValueError,
        "key_cache and value_cache share memory",
    ),
    "one block many times": (
        {"key_cache": KEY[:1].expand(4, -1, -1, -1), "value_cache": REPEATED},
        ValueError,
        "more than one index",
    ),
    "float slots": ({"slots": GOOD.slots.float()}, TypeError, "slots must be int32 or int64"),
    "more slots than tokens": ({"slots": torch.arange(5)}, ValueError, r"\[at most 4\]"),
    "slots of two dimensions": ({"slots": torch.zeros(2, 2).long()}, ValueError, "one a token"),
    "strided slots": ({"slots": torch.arange(8)[::2]}, ValueError, "slots must be contiguous"),
    "slots elsewhere": ({"slots": GOOD.slots.to("meta")}, ValueError, "slots is on meta"),
    "e4m3 without scale": (
        {"key_cache": EIGHT, "value_cache": EIGHT.clone(), "k_scale": ONE},
        ValueError,
        "v_scale is what a cache of torch.float8_e4m3fn needs",
    ),
    "scale without e4m3": ({"k_scale": ONE}, ValueError, "k_scale is what .* and no other"),
    "half scale": (
        {"key_cache": EIGHT, "value_cache": EIGHT.clone(), "k_scale": ONE.half(), "v_scale": ONE},
        TypeError,
        "scale must be float32",
    ),
    "two scales": (
        {"key_cache": EIGHT, "value_cache": EIGHT.clone(), "k_scale": TWO, "v_scale": ONE},
        ValueError,
        "scale must hold one element",
    ),
    "three positions without sections": (
        {"positions": torch.zeros(3, 4).long()}, ValueError, r"positions must be \[4\]"
    ),
    "sections without three positions": (
        {"mrope_section": (8, 4, 4)}, ValueError, r"positions must be \[3, tokens\]"
    ),
    "sections without positions": (
        {"mrope_section": (8, 4, 4), "positions": None}, ValueError, "with mrope_section, not None"
    ),
    "positions of fewer tokens": (
        {"mrope_section": (8, 4, 4), "positions": torch.zeros(3, 3).long()},
        ValueError,
        r"positions must be \[4\]",
    ),
    "sections that do not add up": ({"mrope_section": (8, 4, 3)}, ValueError, "add up to 16"),
    "a negative section": ({"mrope_section": (18, -4, 2)}, ValueError, "add up to 16"),
    "two sections": ({"mrope_section": (8, 8)}, ValueError, "must be three numbers, not"),
    "gradient": ({"k_gamma": torch.ones(32, requires_grad=True)}, ValueError, "no derivative"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused(case: str) -> None:
    changed, error, message = REFUSED[case]
    q, k, v = GOOD.qkv_heads
    good: dict[str, object] = {
        "q": q, "k": k, "v": v, "q_gamma": GOOD.gains[0], "k_gamma": GOOD.gains[1],
        "cos_sin": GOOD.cos_sin, "positions": GOOD.positions,
        "key_cache": KEY, "value_cache": VALUE, "slots": GOOD.slots,
    }  # fmt: skip
    before = GOOD.copy()
    with pytest.raises(error, match=message) as raised:
        ops.qk_rms_norm_rope_cache(**{**good, **changed})  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    assert torch.equal(before.qkv, GOOD.qkv) and torch.equal(before.room, GOOD.room)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, on the first jvp
def test_function_transforms_are_refused() -> None:
    case = make(4, (2, 2, 32), 32, torch.float32, "cpu")

    def run(qkv: Tensor) -> Tensor:
        changed = Case(**{**vars(case), "qkv": qkv.clone()})
        changed.run()
        return changed.qkv

    with pytest.raises(ValueError, match="writes a cache and has no derivative"):
        torch.func.jvp(run, (case.qkv,), (case.qkv,))
