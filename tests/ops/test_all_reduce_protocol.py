"""The protocol of the fused all-reduce, ranks interleaved at random, step by step.

A model of ``kernels/all_reduce/kernel.cu``: what a place of a buffer holds is a message or nothing,
a sender checks that it overwrites nothing, a receiver checks that it got what was meant for it.
The GPU tests run the kernel itself; the model runs every world size, and far stranger schedules.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

Place = tuple[str, int, int, int]  # region, slot, source, row
Message = tuple[int, str, int]  # call, what, source
AHEAD = 4  # as in the kernel


class Overwritten(Exception):
    """A message was sent to a place whose last one nobody has read."""


@dataclass
class Rank:
    number: int
    world: int
    slots: int
    buffer: dict[Place, Message] = field(default_factory=dict)
    uses: dict[tuple[str, int], int] = field(default_factory=dict)
    done: list[dict[int, list[int]]] = field(default_factory=list)

    def slot(self, region: str, row: int) -> int:
        return self.uses.get((region, row), 0) % self.slots

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
    for row in rows[:AHEAD]:
        yield from send_part(ranks, me, call, row)
    for turn in range(len(rows) + 1):
        if turn + AHEAD < len(rows):
            yield from send_part(ranks, me, call, rows[turn + AHEAD])
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


def simulate(world: int, slots: int, seed: int, calls: int = 40) -> None:
    chance = random.Random(seed)
    ranks = [Rank(number, world, slots) for number in range(world)]
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
def test_nothing_is_lost_or_mistaken_with_two_slots(world: int, seed: int) -> None:
    simulate(world, slots=2, seed=seed)


def test_one_slot_would_not_be_enough() -> None:
    with pytest.raises(Overwritten):
        for seed in range(20):
            simulate(world=2, slots=1, seed=seed)
