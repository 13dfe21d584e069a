"""Write `tasks.jsonl`: `python examples/task_accuracy/make_tasks.py`. Always the same bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from tasks import FILE

Item = TypeVar("Item")
Question = tuple[str, str]  # what comes before the answer, and the answer

SHOTS = 3
WORDS = """
river stone apple cloud table green seven horse paper light bread music window garden winter silver
bottle yellow orange market doctor summer engine pocket letter forest
"""
CAPITALS = """
France:Paris Italy:Rome Spain:Madrid Germany:Berlin Japan:Tokyo China:Beijing Russia:Moscow
Egypt:Cairo Greece:Athens Portugal:Lisbon Austria:Vienna Poland:Warsaw Hungary:Budapest
Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Ireland:Dublin Cuba:Havana
Peru:Lima Chile:Santiago Canada:Ottawa Australia:Canberra Kenya:Nairobi Iraq:Baghdad Iran:Tehran
Thailand:Bangkok Vietnam:Hanoi Turkey:Ankara Ukraine:Kyiv Romania:Bucharest Bulgaria:Sofia
Serbia:Belgrade Croatia:Zagreb Belgium:Brussels Netherlands:Amsterdam Cambodia:Phnom_Penh
Argentina:Buenos_Aires Venezuela:Caracas Colombia:Bogotá Ecuador:Quito Uruguay:Montevideo
Ghana:Accra Ethiopia:Addis_Ababa Senegal:Dakar Morocco:Rabat Tunisia:Tunis Lebanon:Beirut
Syria:Damascus Jordan:Amman Afghanistan:Kabul Nepal:Kathmandu Mongolia:Ulaanbaatar Iceland:Reykjavik
Estonia:Tallinn Latvia:Riga Lithuania:Vilnius Slovakia:Bratislava Slovenia:Ljubljana
Jamaica:Kingston
"""
OPPOSITES = """
hot:cold big:small up:down left:right day:night black:white old:young open:closed fast:slow
high:low rich:poor happy:sad hard:soft wet:dry full:empty early:late strong:weak near:far
first:last true:false good:bad long:short light:dark thick:thin love:hate win:lose buy:sell
push:pull inside:outside above:below before:after always:never yes:no north:south east:west
clean:dirty
heavy:light deep:shallow wide:narrow summer:winter
"""
PLURALS = """
cat:cats child:children mouse:mice foot:feet tooth:teeth man:men woman:women box:boxes city:cities
leaf:leaves knife:knives wolf:wolves baby:babies story:stories bus:buses dish:dishes goose:geese
book:books dog:dogs party:parties life:lives wife:wives half:halves country:countries glass:glasses
church:churches lady:ladies key:keys day:days watch:watches
"""
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = """
January February March April May June July August September October November December
"""


class Draw:
    """Random numbers that every version of Python gives alike: those of `random.random`."""

    def __init__(self, kind: str) -> None:
        self._random = random.Random(f"gemma-fold {kind}").random

    def below(self, count: int) -> int:
        return int(self._random() * count)

    def between(self, first: int, last: int) -> int:
        return first + self.below(last - first + 1)

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different ones."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]


def addition(draw: Draw) -> Question:
    most = (9, 99)[draw.below(2)]
    a, b = draw.between(1, most), draw.between(1, most)
    return f"{a} + {b} =", str(a + b)


def subtraction(draw: Draw) -> Question:
    most = (9, 99)[draw.below(2)]
    b = draw.between(1, most)
    a = draw.between(b, most)
    return f"{a} - {b} =", str(a - b)


def multiplication(draw: Draw) -> Question:
    a, b = draw.between(2, 12), draw.between(2, 12)
    return f"{a} * {b} =", str(a * b)


def counting(draw: Draw) -> Question:
    step, start = (1, 2, 5, 10)[draw.below(4)], draw.between(1, 60)
    terms = [start + step * index for index in range(5)]
    return f"Count on: {', '.join(map(str, terms[:4]))},", str(terms[4])


def copying(draw: Draw) -> Question:
    parts = draw.some(WORDS.split(), draw.between(2, 4))
    parts.insert(draw.below(len(parts) + 1), str(draw.between(10, 999)))
    text = " ".join(parts)
    return f"Copy: {text} ->", text


def last_word(draw: Draw) -> Question:
    words = draw.some(WORDS.split(), draw.between(3, 6))
    return f"The last of {', '.join(words)} is", words[-1]


def pairs(text: str) -> list[list[str]]:
    return [pair.replace("_", " ").split(":") for pair in text.split()]


def after(text: str, what: str) -> list[Question]:
    names = text.split()
    following = [*names[1:], names[0]]
    return [(f"The {what} after {a} is", b) for a, b in zip(names, following, strict=True)]


MADE: dict[str, tuple[Callable[[Draw], Question], int]] = {
    "addition": (addition, 100),
    "subtraction": (subtraction, 60),
    "multiplication": (multiplication, 40),
    "counting": (counting, 60),
    "copying": (copying, 100),
    "last_word": (last_word, 60),
}
KNOWN: dict[str, list[Question]] = {
    "capitals": [(f"The capital of {a} is", b) for a, b in pairs(CAPITALS)],
    "opposites": [(f"The opposite of {a} is", b) for a, b in pairs(OPPOSITES)],
    "plurals": [(f"One {a}, two", b) for a, b in pairs(PLURALS)],
    "calendar": after(DAYS, "day") + after(MONTHS, "month"),
}


def questions() -> dict[str, list[Question]]:
    """Of every kind, all different."""
    found = dict(KNOWN)
    for kind, (make, count) in MADE.items():
        draw, different = Draw(kind), dict[Question, None]()
        while len(different) < count:
            different[make(draw)] = None
        found[kind] = list(different)
    return found


def tasks() -> list[dict[str, str]]:
    """All of them, kinds interleaved in proportion."""
    placed = []
    for kind, asked in questions().items():
        draw = Draw(f"{kind} shots")
        for index, (question, answer) in enumerate(asked):
            others = asked[:index] + asked[index + 1 :]
            shots = [f"{one} {solved}\n" for one, solved in draw.some(others, SHOTS)]
            prompt = "".join(shots) + question
            task = {"id": f"{kind}-{index:03}", "kind": kind, "prompt": prompt, "answer": answer}
            placed.append(((index + 0.5) / len(asked), kind, task))
    return [task for _, _, task in sorted(placed, key=lambda one: one[:2])]


if __name__ == "__main__":
    lines = [json.dumps(task, ensure_ascii=False) + "\n" for task in tasks()]
    FILE.write_text("".join(lines), "utf-8")
