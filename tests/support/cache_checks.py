"""What the tests of qk_rms_norm_rope_cache share: operands, and the sequence it replaces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from norm_checks import fused_qkv, gamma, rows, table
from torch import Tensor

from gemma_fold import ops

EPS = 1e-6
FP8 = torch.float8_e4m3fn
POSITIONS = 300
PAGE = 4
LAYOUTS = ("nhd", "hnd", "flat", "odd")


@dataclass
class Case:
    """Operands of one call. ``room`` is the memory that holds both caches."""

    qkv: Tensor
    heads: tuple[int, int, int]
    gains: tuple[Tensor, Tensor]
    cos_sin: Tensor
    positions: Tensor
    room: Tensor
    layout: str
    slots: Tensor
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    interleaved: bool = False
    section: tuple[int, int, int] | None = None
    in_turn: bool = False

    @property
    def qkv_heads(self) -> tuple[Tensor, Tensor, Tensor]:
        q_heads, k_heads, size = self.heads
        heads = self.qkv.view(-1, q_heads + 2 * k_heads, size)
        return heads[:, :q_heads], heads[:, q_heads:-k_heads], heads[:, -k_heads:]

    @property
    def caches(self) -> tuple[Tensor, Tensor]:
        """Views of ``room``."""
        room, size = self.room, self.heads[2]
        if self.layout == "hnd":  # [blocks, heads, page, 2 * size]: heads before places
            room = room.transpose(1, 2)
        if self.layout in ("hnd", "odd"):
            return room[..., -2 * size : -size], room[..., -size:]
        return room[0], room[1]

    def run(self) -> None:
        ops.qk_rms_norm_rope_cache(
            *self.qkv_heads, *self.gains, self.cos_sin, self.positions, *self.caches,
            self.slots, EPS, k_scale=self.scales[0], v_scale=self.scales[1],
            interleaved=self.interleaved, mrope_section=self.section,
            mrope_interleaved=self.in_turn,
        )  # fmt: skip

    def copy(self) -> Case:
        return replace(self, qkv=self.qkv.clone(), room=self.room.clone())


def make(
    tokens: int,
    heads: tuple[int, int, int],
    rotary_dim: int,
    dtype: torch.dtype,
    device: str,
    *,
    layout: str = "nhd",
    fp8: bool = False,
    wide_table: bool = True,
    section: tuple[int, int, int] | None = None,
    **others: bool,
) -> Case:
    """A third of the tokens are padding, lie outside the cache, or have no slot."""
    _, k_heads, size = heads
    qkv = fused_qkv(tokens, heads, dtype, device)[0]
    generator = torch.Generator().manual_seed(71)
    blocks = tokens // PAGE + 3
    shapes = {
        "nhd": (2, blocks, PAGE, k_heads, size),
        "hnd": (blocks, k_heads, PAGE, 2 * size),
        "flat": (2, blocks * PAGE, k_heads, size),
        "odd": (blocks, PAGE, k_heads, 2 * size + 3),  # rows that miss every alignment
    }
    room = rows(shapes[layout], torch.float32, 72, "cpu").to(device, FP8 if fp8 else dtype)
    slots = torch.randperm(blocks * PAGE, generator=generator)[:tokens]
    outside = (-1, blocks * PAGE, 2**62, -(2**62))
    for index, token in enumerate(range(2, tokens, 5)):
        slots[token] = outside[index % len(outside)]
    shape = (3, tokens) if section else (tokens,)
    positions = torch.randint(0, POSITIONS, shape, generator=generator)

    def scale(value: float) -> Tensor | None:
        return torch.tensor([value], device=device) if fp8 else None

    return Case(
        qkv=qkv,
        heads=heads,
        gains=(gamma(size, 73, device), gamma(size, 74, device)),
        cos_sin=table(POSITIONS, rotary_dim, torch.float32 if wide_table else dtype, device),
        positions=positions.to(device),
        room=room,
        layout=layout,
        slots=slots[: tokens - tokens // 8].to(device),
        scales=(scale(0.37), scale(2.9)),
        section=section,
        **others,
    )


def turned_by_axes(case: Case) -> Tensor:
    """A row of the table for each token whose pairs are turned by one of three positions."""
    assert case.section is not None
    time, height, width = case.section
    half = case.cos_sin.shape[1] // 2
    axes = [0] * time + [1] * height + [2] * width
    if case.in_turn:
        axes = [0] * half
        axes[1 : 3 * height : 3] = [1] * len(axes[1 : 3 * height : 3])
        axes[2 : 3 * width : 3] = [2] * len(axes[2 : 3 * width : 3])
    rows_of = [case.cos_sin[position] for position in case.positions]
    columns = [rows_of[axis][:, i % half] for i, axis in zip(range(half), axes, strict=True)]
    columns += [rows_of[axis][:, half + i] for i, axis in zip(range(half), axes, strict=True)]
    return torch.stack(columns, dim=1)


def run_unfused(case: Case) -> None:
    """What ``case.run`` must equal: qk_rms_norm_rope, then each token's rows into its slot."""
    q, k, v = case.qkv_heads
    turned = k.clone()
    by_token = turned_by_axes(case).contiguous() if case.section else None
    ops.qk_rms_norm_rope(
        q, turned, *case.gains, case.cos_sin if by_token is None else by_token,
        case.positions if by_token is None else None, EPS, interleaved=case.interleaved,
    )  # fmt: skip
    for x, cache, scale in zip((turned, v), case.caches, case.scales, strict=True):
        if scale is not None:
            x = (x.float() / scale).clamp(-448.0, 448.0).to(FP8)
        page = cache.shape[1] if cache.dim() == 4 else 1
        for token, slot in enumerate(case.slots.tolist()):
            if 0 <= slot < cache.shape[0] * page:
                place = cache[slot // page, slot % page] if cache.dim() == 4 else cache[slot]
                place.copy_(x[token])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check(case: Case) -> None:
    """The fused call leaves the bits of the sequence it replaces, and k and v as they were."""
    want = case.copy()
    run_unfused(want)
    assert not same_bits(case.room, want.room)
    case.run()
    assert same_bits(case.room, want.room)
    assert same_bits(case.qkv, want.qkv)


def compiled(case: Case, counts: tuple[int, ...]) -> Iterator[tuple[tuple[Tensor, Tensor], ...]]:
    """For so many tokens: what a compiled call gives and a plain one, and the room of each.

    It must be one graph for all of them; inside it q and both caches are views.
    """
    q_heads, k_heads, size = case.heads
    assert case.layout == "hnd"

    def attention(qkv: Tensor, positions: Tensor, room: Tensor, slots: Tensor) -> Tensor:
        heads = (qkv * 2).view(-1, q_heads + 2 * k_heads, size)
        q, k, v = heads[:, :q_heads], heads[:, q_heads:-k_heads], heads[:, -k_heads:]
        places = room.transpose(1, 2)
        keys, values = places[..., :size], places[..., size:]
        ops.qk_rms_norm_rope_cache(
            q, k, v, *case.gains, case.cos_sin, positions, keys, values, slots, EPS
        )
        return q + 1

    torch._dynamo.reset()
    traced = torch.compile(attention, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for tokens in counts:
        args = case.qkv[:tokens], case.positions[:tokens]
        rooms = case.room.clone(), case.room.clone()
        slots = case.slots[: tokens - 2]
        got, want = traced(*args, rooms[0], slots), attention(*args, rooms[1], slots)
        assert not same_bits(rooms[1], case.room)
        yield (got, want), rooms
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
