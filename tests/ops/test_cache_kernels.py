"""The kernel that writes a cache, on CPU in Triton's interpreter: run by test_ops.py."""

from __future__ import annotations

import os

import cache_checks
import pytest
import torch
from cache_checks import LAYOUTS, make

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_ops.py with TRITON_INTERPRET=1", allow_module_level=True)

from gemma_fold import ops

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize(
    ("heads", "rotary_dim"),
    (((4, 1, 128), 128), ((5, 2, 256), 64), ((3, 2, 96), 96), ((1, 1, 7), 6)),
)
def test_equals_the_sequence_it_replaces(
    heads: tuple[int, int, int],
    rotary_dim: int,
    interleaved: bool,
    layout: str,
    dtype: torch.dtype,
) -> None:
    case = make(21, heads, rotary_dim, dtype, "cpu", layout=layout, interleaved=interleaved)
    cache_checks.check(case)


@pytest.mark.parametrize("in_turn", (False, True))
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("kind", (torch.int32, torch.int64))
def test_three_positions_a_token(kind: torch.dtype, interleaved: bool, in_turn: bool) -> None:
    case = make(
        19, (4, 2, 256), 64, torch.float16, "cpu", wide_table=False,
        section=(14, 11, 7), interleaved=interleaved, in_turn=in_turn,
    )  # fmt: skip
    room = torch.zeros(3, 23, dtype=kind)  # as an engine has them: the first columns of a buffer
    room[:, :19] = case.positions
    case.positions = room[:, :19]
    case.slots = case.slots.clamp(-(2**30), 2**30).to(kind)
    cache_checks.check(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_e4m3_of_values_that_it_holds(layout: str) -> None:
    case = make(6, (2, 1, 128), 64, torch.float32, "cpu", layout=layout, fp8=True)
    gain = torch.tensor([0.5, 1.0, 1.75, 14.0, 448.0, 0.0, 2.0, 3.5] * 16)
    case.gains = gain, gain
    case.scales = torch.tensor([0.25]), torch.tensor([2.0])
    case.qkv.sign_()
    case.qkv_heads[2].mul_(2.0 * gain)
    case.positions.zero_()  # no rotation
    case.slots = torch.tensor([0, 4, 9, -1, 2**40, 3])
    k, v = (x.clone() for x in case.qkv_heads[1:])
    ops.qk_rms_norm_rope_cache(
        *case.qkv_heads, *case.gains, case.cos_sin, case.positions, *case.caches, case.slots, 0.0,
        k_scale=case.scales[0], v_scale=case.scales[1],
    )  # fmt: skip
    keys, values = (x.float().flatten(0, -3) for x in case.caches)
    for token, slot in enumerate(case.slots.tolist()):
        if 0 <= slot < keys.shape[0]:
            assert torch.equal(keys[slot], (k[token] * gain * 4.0).clamp(-448.0, 448.0))
            assert torch.equal(values[slot], v[token] / 2.0)


def test_q_of_its_own_and_no_tokens() -> None:
    case = make(5, (2, 1, 32), 16, torch.float16, "cpu")
    before = case.copy()
    got = torch.ops.gemma_fold.qk_rms_norm_rope_cache(
        *case.qkv_heads, *case.gains, case.cos_sin, case.positions, *case.caches, case.slots,
        None, None, cache_checks.EPS, False, 0, 0, 0, False,
    )  # fmt: skip
    assert torch.equal(case.qkv, before.qkv) and got.is_contiguous()
    before.run()
    assert torch.equal(got, before.qkv_heads[0]) and torch.equal(case.room, before.room)
    cache_checks.make(0, (2, 1, 32), 16, torch.float16, "cpu").run()
