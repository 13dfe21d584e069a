"""Mutations that keep JSON well-formed, so that the fuzzer gets past the parser to the values."""

from __future__ import annotations

import json
import random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**64, 10**350, -0.0, 1.5, 1e308, float("inf"),
    float("nan"), "", "x", ".", "..", "../x", "/etc/passwd", "a/b", "a//b", "C:", "NUL", "a\\b",
    "a\0b", "\ud800", "\n", "a" * 300, "model.safetensors", "config.json", "gemma_fold.json",
    "BF16", "F32", "F8_E4M3", "float32", "storage", "gemma3_text", "llava", "{}", "{a,b}{a,b}",
    "AAAA", "0" * 64, [], {}, [0], [4], [4, 1], [2**40, 2**40], [-1], [True], [[]], [{}], {"": {}},
    {"weight_map": {}}, {"model_type": "llama"}, {"count": 1, "index": None, "bits": "AAA="},
)  # fmt: skip


def mutate(content: bytes, seed: int) -> bytes | None:
    """`content` with a value replaced, removed, copied or renamed; None where it is no JSON."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    draw = random.Random(seed)
    places = list(_places(document)) if isinstance(document, dict | list) else []
    if not places:
        return None
    for _ in range(draw.randint(1, 3)):
        holder, key = draw.choice(places)
        try:
            _change(holder, key, draw, places)
        except (KeyError, IndexError):
            continue
    try:
        return json.dumps(document, ensure_ascii=draw.random() < 0.8).encode()
    except (ValueError, RecursionError):
        return None


def _change(holder: Any, key: Any, draw: random.Random, places: list[tuple[Any, Any]]) -> None:
    match draw.randrange(5):
        case 0:
            del holder[key]
        case 1:
            other, there = draw.choice(places)
            holder[key] = json.loads(json.dumps(other[there]))
        case 2 if isinstance(holder, dict):
            holder[str(draw.choice(HOSTILE))[:300]] = holder.pop(key)
        case 3 if isinstance(holder[key], str) and holder[key].startswith("{"):
            inner = mutate(holder[key].encode(), draw.randrange(2**32))
            holder[key] = inner.decode() if inner else ""
        case 3 if type(holder[key]) is int:
            holder[key] += draw.choice((-1, 1, 2, -8, 8))
        case _:
            holder[key] = draw.choice(HOSTILE)


def _places(value: Any, depth: int = 0) -> Any:
    if depth > 50:
        return
    keys: Any = value if isinstance(value, dict) else range(len(value))
    for key in keys if isinstance(value, dict | list) else ():
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key], depth + 1)
