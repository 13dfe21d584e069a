"""The protocol of the fused all-reduce, ranks interleaved at random, step by step.

A model of ``ops/collectives/kernel.cu``: what a place of a buffer holds is a message or nothing,
a sender checks that it overwrites nothing, a receiver checks that it got what was meant for it.
The GPU tests run the kernel itself; the model runs every world size, and far stranger schedules.
It reads its numbers from the kernel's source, and does not run where the kernel says something else
than the model was written after.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files

import pytest
import torch

from gemma_fold.ops.collectives.exchange import Capacity

Place = tuple[str, int, int, int]  # region, slot, source, row
Message = tuple[int, str, int]  # call, what, source
KERNEL = files("gemma_fold.ops.collectives").joinpath("kernel.cu").read_text()

#: What the model says after the kernel, in the order of the kernel.
SAID = (
    "constexpr int PEERS = WORLD - 1;",
    "if (complete) break;",
    "if (owns(v)) put_empty(first + i * step + vector_offset(v));",
    "if (threadIdx.x == 0) a.uses[row] = slot + 1;",
    "for (int row = blockIdx.x; row < a.rows; row += gridDim.x) {",
    "send(a.buffers[to] + one_shot_row(a, slot, place_of(a.rank, to), row)",
    "receive<PEERS>(a, a.buffers[a.rank] + one_shot_row(a, slot, 0, row),",
    "const int owner = row % WORLD; if (row >= a.rows || owner == a.rank) return;",
    "a.buffers[owner] + partial_row(a, slot, place_of(a.rank, owner), row);",
    "for (int k = 0; k < AHEAD; k++) send_partial(a, blockIdx.x + k * step);",
    "for (int row = blockIdx.x; row < a.rows + step; row += step) {"
    " send_partial(a, row + AHEAD * step); if (row < a.rows && row % WORLD == a.rank) {",
    "receive<PEERS>(a, a.buffers[a.rank] + partial_row(a, slot, 0, row),",
    "send(a.buffers[to] + sum_row(a, slot, row) + vector_offset(v), rounded);",
    "const int last = row - step; if (last >= 0 && last % WORLD != a.rank) {",
    "receive<1>(a, a.buffers[a.rank] + sum_row(a, slot, last), 0, last % WORLD, got);",
)


class OtherKernelError(Exception):
    """The kernel is another one than the model was written after: look at both again."""


@dataclass(frozen=True)
class Protocol:
    """The numbers of the kernel that its schedule depends on."""

    ahead: int  # turns
    slots: int  # of a row


def number(code: str, pattern: str) -> int:
    """The one number that `pattern` finds."""
    found = re.findall(pattern, code)
    if len(found) != 1:
        raise OtherKernelError(f"{len(found)} of {pattern}")
    return int(found[0], 0)


def protocol_of(source: str) -> Protocol:
    """What a ``kernel.cu`` does, in the model's terms."""
    code = " ".join(re.sub(r"//.*", "", source).split())
    at = 0
    for statement in SAID:
        at = code.find(statement, at)
        if at < 0:
            raise OtherKernelError(statement)
    slots = number(code, r"return uses & (\w+);") + 1
    if slots & (slots - 1) or slots != number(code, r"u64\((\w+) \* PEERS\)"):
        raise OtherKernelError(f"{slots} slots of a row are not what the layout holds")
    return Protocol(number(code, r"constexpr int AHEAD = (\w+);"), slots)


class Overwritten(Exception):
    """A message was sent to a place whose last one nobody has read."""


@dataclass
class Rank:
    number: int
    world: int
    protocol: Protocol
    buffer: dict[Place, Message] = field(default_factory=dict)
    uses: dict[tuple[str, int], int] = field(default_factory=dict)
    done: list[dict[int, list[int]]] = field(default_factory=list)

    def slot(self, region: str, row: int) -> int:
        return self.uses.get((region, row), 0) % self.protocol.slots

    def count(self, region: str, row: int) -> None:
        self.uses[region, row] = self.uses.get((region, row), 0) + 1


def send(to: Rank, place: Place, message: Message) -> None:
    if place in to.buffer:
        raise Overwritten(f"rank {to.number} {place}: {to.buffer[place]} by {message}")
    to.buffer[place] = message


def receive(rank: Rank, place: Place, call: int, what: str) -> Iterator[None]:
    """Polls until something is there, and empties the place in a step of its own."""
    while place not in rank.buffer:
        yield
    assert rank.buffer[place] == (call, what, place[2]), (call, place, rank.buffer[place])
    yield
    del rank.buffer[place]


def one_shot(ranks: list[Rank], me: Rank, call: int, rows: list[int]) -> Iterator[None]:
    others = [rank for rank in ranks if rank is not me]
    for row in rows:
        slot = me.slot("one", row)
        for other in others:
            send(other, ("one", slot, me.number, row), (call, "part", me.number))
            yield
    for row in rows:
        slot = me.slot("one", row)
        for other in others:
            yield from receive(me, ("one", slot, other.number, row), call, "part")
        yield
        me.count("one", row)


def send_part(ranks: list[Rank], me: Rank, call: int, row: int) -> Iterator[None]:
    owner = row % me.world
    if owner != me.number:
        slot = me.slot("two", row)
        send(ranks[owner], ("part", slot, me.number, row), (call, "part", me.number))
        yield


def add_up(ranks: list[Rank], me: Rank, call: int, row: int) -> Iterator[None]:
    slot = me.slot("two", row)
    others = [rank for rank in ranks if rank is not me]
    for other in others:
        yield from receive(me, ("part", slot, other.number, row), call, "part")
    for other in others:
        send(other, ("sum", slot, me.number, row), (call, "sum", me.number))
        yield
    me.count("two", row)


def two_shot(ranks: list[Rank], me: Rank, call: int, rows: list[int]) -> Iterator[None]:
    """Each turn: send a later row, add up this one or, a turn late, take another's sum."""
    ahead = me.protocol.ahead
    for row in rows[:ahead]:
        yield from send_part(ranks, me, call, row)
    for turn in range(len(rows) + 1):
        if turn + ahead < len(rows):
            yield from send_part(ranks, me, call, rows[turn + ahead])
        if turn < len(rows) and rows[turn] % me.world == me.number:
            yield from add_up(ranks, me, call, rows[turn])
        last = rows[turn - 1] if turn else me.number
        if last % me.world != me.number:
            slot = me.slot("two", last)
            yield from receive(me, ("sum", slot, last % me.world, last), call, "sum")
            yield
            me.count("two", last)


def kernel(ranks: list[Rank], me: Rank, call: int, tokens: int, both: bool) -> Iterator[None]:
    """Blocks of one kernel, each with its own rows, interleaved at random."""
    protocol = two_shot if both else one_shot
    chance = random.Random(me.number * 1_000_003 + call)
    # Which block a row belongs to differs between ranks: their GPUs may differ.
    blocks = chance.randint(1, 4)
    running = [
        protocol(ranks, me, call, list(range(block, tokens, blocks))) for block in range(blocks)
    ]
    while running:
        block = chance.choice(running)
        for _ in range(3):
            if next(block, StopIteration) is StopIteration:
                running.remove(block)
                break
            yield


def program(ranks: list[Rank], me: Rank, calls: list[tuple[int, bool]]) -> Iterator[None]:
    """Kernels run one after the other: none sends before the one before it is over."""
    for call, (tokens, both) in enumerate(calls):
        yield from kernel(ranks, me, call, tokens, both)


def simulate(world: int, protocol: Protocol, seed: int, calls: int = 40) -> None:
    chance = random.Random(seed)
    ranks = [Rank(number, world, protocol) for number in range(world)]
    plan = [(chance.choice([1, 1, 2, 3, 5, 9]), chance.random() < 0.5) for _ in range(calls)]
    running = {rank.number: program(ranks, rank, plan) for rank in ranks}
    steps = 0
    while running:
        # One rank runs ahead for a while: as far as the protocol lets it.
        number = chance.choice(list(running))
        for _ in range(chance.choice([1, 5, 200])):
            steps += 1
            assert steps < 2_000_000, "nothing arrives any more"
            if next(running[number], StopIteration) is StopIteration:
                del running[number]
                break
    assert not any(rank.buffer for rank in ranks), "something was sent that nobody read"


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_or_mistaken(world: int, seed: int) -> None:
    simulate(world, protocol_of(KERNEL), seed)


def changed(old: str, new: str) -> str:
    assert KERNEL.count(old) == 1, old
    return KERNEL.replace(old, new)


def test_one_slot_would_not_be_enough() -> None:
    kernel = changed("return uses & 1;", "return uses & 0;")
    kernel = kernel.replace("u64(2 * PEERS)", "u64(1 * PEERS)")
    with pytest.raises(Overwritten):
        for seed in range(20):
            simulate(2, protocol_of(kernel), seed)


@pytest.mark.parametrize("ahead", [protocol_of(KERNEL).ahead, 0, 7])
def test_the_model_sends_as_far_ahead_as_the_kernel(ahead: int) -> None:
    """Until the first sum arrives, which the second turn waits for."""
    kernel = re.sub(r"(constexpr int AHEAD = )\d+;", rf"\g<1>{ahead};", KERNEL)
    owner, me = ranks = [Rank(number, 2, protocol_of(kernel)) for number in range(2)]
    rows = list(range(0, 40, 2))  # all of them the other one's
    running = two_shot(ranks, me, 0, rows)
    for _ in range(100):
        next(running)
    assert [place[3] for place in owner.buffer] == rows[: ahead + 2]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return uses & 1;", "return uses & 2;"),
        ("return uses & 1;", "return uses & 3;"),  # more slots than the buffer has
        ("u64(2 * PEERS)", "u64(3 * PEERS)"),
        ("constexpr int AHEAD = ", "constexpr int EARLY = "),
        ("a.uses[row] = slot + 1;", "a.uses[row] = slot + 2;"),
        ("const int last = row - step;", "const int last = row - 2 * step;"),
        ("row < a.rows + step;", "row < a.rows;"),
        ("const int owner = row % WORLD;", "const int owner = row / WORLD;"),
    ],
)
def test_another_kernel_is_not_taken_for_this_one(old: str, new: str) -> None:
    with pytest.raises(OtherKernelError):
        protocol_of(changed(old, new))


def test_buffers_have_the_slots_of_the_kernel() -> None:
    slots = protocol_of(KERNEL).slots
    assert Capacity(one_shot_rows=1, two_shot_rows=0, pitch=1, world=2).bytes == slots
    assert Capacity(one_shot_rows=0, two_shot_rows=1, pitch=1, world=2).bytes == 2 * slots


def test_no_dtype_has_a_number_that_looks_like_nothing() -> None:
    empty, instead = (
        number(KERNEL, rf"constexpr u32 {name} = (\w+)u;") for name in ("EMPTY", "OTHER_NAN")
    )
    assert empty != instead
    for word in (empty, instead):
        sent = torch.tensor([word], dtype=torch.uint32)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert sent.view(dtype).isnan().all()
