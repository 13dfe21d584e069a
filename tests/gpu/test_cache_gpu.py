"""q and k norm, rotary embedding and the cache's write on a GPU: the bits of the sequence."""

from __future__ import annotations

import cache_checks
import pytest
import torch
from cache_checks import EPS, FP8, LAYOUTS, POSITIONS, make, run_unfused, same_bits
from norm_checks import rows

from gemma_fold import ops
from gemma_fold.ops.operators.qk_rms_norm_rope_cache import reference

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# (q heads, k heads, head_dim), rotary_dim
SHAPES = (
    ((8, 4, 256), 256),
    ((32, 16, 128), 128),
    ((16, 2, 256), 64),
    ((4, 1, 256), 256),
    ((3, 2, 96), 96),
    ((2, 1, 80), 20),
    ((2, 1, 512), 512),
    ((1, 1, 7), 2),
)
# Layouts change how rows are reached, not what is done with them: two shapes have all of them.
PLACES = [(*shape, "hnd") for shape in SHAPES]
OTHERS = [layout for layout in LAYOUTS if layout != "hnd"]
PLACES += [(*shape, layout) for shape in (SHAPES[0], SHAPES[4]) for layout in OTHERS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", (False, True))
@pytest.mark.parametrize(("heads", "rotary_dim", "layout"), PLACES)
def test_equals_the_sequence_it_replaces(
    heads: tuple[int, int, int], rotary_dim: int, layout: str, fp8: bool, dtype: torch.dtype
) -> None:
    # Each pair of settings compiles kernels of its own: not every one at every size.
    for tokens, wide_table, interleaved in ((1, True, False), (9, False, True), (300, True, False)):
        case = make(
            tokens, heads, rotary_dim, dtype, "cuda", layout=layout, fp8=fp8,
            wide_table=wide_table, interleaved=interleaved,
        )  # fmt: skip
        case.slots = case.slots if tokens > 1 else torch.tensor([5], device="cuda")
        cache_checks.check(case)


@pytest.mark.parametrize("in_turn", (False, True))
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("fp8", (False, True))
@pytest.mark.parametrize("kind", (torch.int32, torch.int64))
def test_three_positions_a_token(
    kind: torch.dtype, fp8: bool, interleaved: bool, in_turn: bool
) -> None:
    for section in ((11, 11, 10), (24, 5, 3)):
        case = make(
            70, (16, 2, 256), 64, torch.bfloat16, "cuda", fp8=fp8,
            section=section, interleaved=interleaved, in_turn=in_turn,
        )  # fmt: skip
        buffer = torch.zeros(3, 131, dtype=kind, device="cuda")  # an engine's, for more tokens
        buffer[:, 1:71] = case.positions
        case.positions = buffer[:, 1:71]
        case.slots = case.slots.clamp(-(2**30), 2**30).to(kind)
        cache_checks.check(case)


def test_near_the_reference_in_plain_torch() -> None:
    for fp8 in (False, True):
        case = make(40, (8, 4, 256), 256, torch.bfloat16, "cuda", fp8=fp8)
        want = case.copy()
        q = reference(
            *want.qkv_heads, *want.gains, want.cos_sin, want.positions, *want.caches, want.slots,
            *want.scales, EPS, False, 0, 0, 0, False,
        )  # fmt: skip
        case.run()
        torch.testing.assert_close(case.qkv_heads[0], q, rtol=2**-6, atol=2**-6)
        keys, values = (
            [x.float() for x in pair] for pair in zip(case.caches, want.caches, strict=True)
        )
        torch.testing.assert_close(*keys, rtol=2**-3 if fp8 else 2**-6, atol=2**-6)
        assert torch.equal(*(x.nan_to_num() for x in values))


@pytest.mark.parametrize("fp8", (False, True))
@pytest.mark.parametrize("layout", ("nhd", "hnd"))
def test_cuda_graph_replays_with_new_slots_and_positions(layout: str, fp8: bool) -> None:
    case = make(32, (8, 4, 256), 256, torch.bfloat16, "cuda", layout=layout, fp8=fp8)
    case.slots = torch.arange(32, device="cuda")
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run()
    for step, alive in enumerate((32, 5, 0)):
        case.qkv.copy_(rows(tuple(case.qkv.shape), torch.bfloat16, 80 + step, "cuda"))
        case.positions.add_(7).remainder_(POSITIONS)
        case.slots.copy_((torch.arange(32, device="cuda") * 3 + step) % 44)
        case.slots[alive:] = -1  # padding up to the size of the graph
        want = case.copy()
        run_unfused(want)
        graph.replay()
        assert same_bits(case.room, want.room) and same_bits(case.qkv, want.qkv)


def test_outside_the_cache_nothing_is_written() -> None:
    """The cache is the middle of a tensor, and every slot is hostile."""
    case = make(64, (4, 2, 128), 128, torch.bfloat16, "cuda")
    room = torch.zeros(2, 300, 4, 2, 128, device="cuda", dtype=torch.bfloat16)
    caches = room[0, 100:110], room[1, 100:110]
    far = [-1, 40, 41, -40, 2**31, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63)]
    slots = torch.tensor((far * 6)[:64], device="cuda")
    ops.qk_rms_norm_rope_cache(
        *case.qkv_heads, *case.gains, case.cos_sin, case.positions, *caches, slots, EPS
    )
    torch.cuda.synchronize()
    assert not room.any()


def test_more_than_two_to_the_31_elements_of_cache() -> None:
    case = make(3, (2, 1, 128), 128, torch.bfloat16, "cuda")
    blocks = 2**31 // (2 * 16 * 128) + 3
    room = torch.zeros(blocks, 1, 16, 256, device="cuda", dtype=torch.bfloat16)
    caches = room.transpose(1, 2).split(128, dim=-1)
    last = blocks * 16 - 1
    slots = torch.tensor([last, 0, last - 17], device="cuda")
    values = case.qkv_heads[2].clone()
    ops.qk_rms_norm_rope_cache(
        *case.qkv_heads, *case.gains, case.cos_sin, case.positions, *caches, slots, EPS
    )
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(caches[1][slot // 16, slot % 16], values[token])
        assert caches[0][slot // 16, slot % 16].any()
    assert room[1:-3].count_nonzero() == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, on the first compile
def test_compiles_whole_and_once_for_every_token_count() -> None:
    case = make(333, (6, 3, 128), 128, torch.bfloat16, "cuda", layout="hnd")
    for results, rooms in cache_checks.compiled(case, (8, 4, 64, 333)):
        assert torch.equal(*results) and same_bits(*rooms)


@pytest.mark.parametrize("fp8", (False, True))
@pytest.mark.parametrize("layout", ("nhd", "hnd"))
def test_equals_vllms_cache_write(layout: str, fp8: bool) -> None:
    vllm_ops = pytest.importorskip("vllm._custom_ops")
    for dtype in (torch.bfloat16, torch.float16):
        case = make(50, (8, 4, 256), 256, dtype, "cuda", layout=layout, fp8=fp8)
        held = case.slots.clamp(-1)
        case.slots = torch.where(held < case.caches[0].shape[0] * cache_checks.PAGE, held, -1)
        want = case.copy()
        q, k, v = want.qkv_heads
        ops.qk_rms_norm_rope(q, k, *want.gains, want.cos_sin, want.positions, EPS)
        bytes_of = torch.uint8 if fp8 else dtype
        one = torch.ones(1, device="cuda")
        scales = [one if s is None else s for s in want.scales]
        vllm_ops.reshape_and_cache_flash(
            k, v, *(x.view(bytes_of) for x in want.caches), want.slots,
            "fp8" if fp8 else "auto", *scales,
        )  # fmt: skip
        case.run()
        assert same_bits(case.room, want.room)
        assert case.room.dtype == (FP8 if fp8 else dtype)
