"""Values from JSON files that anyone may have written: typed, bounded, or an error that names them.

`parse_json_object` reads the text; `Fields` hands out the values of one map, each by the type that
is expected there, so that no later code meets a value of another type.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from gemma_fold.checkpoint.names import shown
from gemma_fold.errors import CheckpointError

T = TypeVar("T")

MAX_SIZE = 2**63 - 1
"""Bytes; no file can be larger."""

_MAX_DIGITS = 400  # of an integer; more take long to convert, and mean nothing
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Refused(ValueError):
    """Why a text from a file is refused; whoever reads it adds which file."""


def parse_json_object(raw: bytes, where: Path | str) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, no key twice, no lone surrogates.

    Raises:
        CheckpointError: it is not that; the message names `where`.
    """
    try:
        value = json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=unique, parse_int=_bounded_integer
        )
        if rb"\ud" in raw or rb"\uD" in raw:
            # Python lets an escaped lone surrogate through, which no file can then be written with.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise CheckpointError(
            f"{where} is not valid JSON: nested too deeply; fetch the file again"
        ) from None
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise CheckpointError(
            f"{where} is not valid JSON: not UTF-8 ({error.reason}); fetch the file again"
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"{where} is not valid JSON: {error}; fetch the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} does not hold a JSON object; fetch the file again")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; Refused if a key comes twice."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        first = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Refused(f"the key {shown(first)} appears twice")
    return value


def _bounded_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise Refused(f"an integer of {len(text)} digits")
    return int(text)


def shorten(value: object) -> str:
    """A value for a message: as JSON, and cut if it is long."""
    try:
        text = json.dumps(value, default=repr)
    except (RecursionError, ValueError):
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


class Fields:
    """The values of one JSON map by key and expected type.

    A missing key and a value of another type raise CheckpointError, as in "invalid offset of
    tensor X in PATH: expected a number, got true; fold the original again". Keys that are not asked
    for are not looked at.

    Attributes:
        where: file that the map is in.
        subject: which map of that file, for messages; "" for the file itself.
    """

    def __init__(self, value: object, where: Path | str, subject: str = "") -> None:
        self.where = where
        self.subject = subject
        if not isinstance(value, dict):
            raise _invalid(subject or "content", where, "a map", shorten(value))
        self._value: dict[str, Any] = value

    def error(self, key: str, expected: str) -> CheckpointError:
        """What to raise if the value of `key` is not as `expected`."""
        what = f"{key} of {self.subject}" if self.subject else key
        got = shorten(self._value[key]) if key in self._value else "nothing"
        return _invalid(what, self.where, expected, got)

    def text(self, key: str) -> str:
        """A string."""
        return self._expect(key, "a string", lambda v: v if isinstance(v, str) else None)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of the strings `allowed`."""
        expected = " or ".join(shorten(word) for word in allowed)
        return self._expect(
            key, expected, lambda v: v if isinstance(v, str) and v in allowed else None
        )

    def flag(self, key: str) -> bool:
        """True or false."""
        return self._expect(key, "true or false", lambda v: v if isinstance(v, bool) else None)

    def integer(self, key: str, most: int = MAX_SIZE, *, default: int | None = None) -> int:
        """A whole number from 0 to `most`; `default` if the key is absent."""
        if default is not None and key not in self._value:
            return default
        return self._expect(key, f"an integer from 0 to {most}", lambda v: _integer(v, most))

    def number(self, key: str) -> float:
        """A finite number that a float32 can come near to."""
        return self._expect(key, "a number", _number)

    def digests(self, key: str) -> dict[str, str]:
        """A map of names to digests."""
        digests = self.map(key)
        return {name: digests.digest(name) for name in digests._value}

    def digest(self, key: str) -> str:
        """A digest of 256 bits in lower-case hexadecimal."""
        expected = "64 hexadecimal digits"
        return self._expect(
            key, expected, lambda v: v if isinstance(v, str) and _DIGEST.fullmatch(v) else None
        )

    def base64(self, key: str) -> bytes:
        """The bytes of a base64 string."""
        return self._expect(key, "base64", _decoded)

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        """`read(key)`, or None if the value is null or absent."""
        return None if self._value.get(key) is None else read(key)

    def integers(self, key: str, length: int) -> tuple[int, ...]:
        """A list of `length` whole numbers."""
        expected = f"a list of {length} integer{'s'[: length != 1]} from 0 to {MAX_SIZE}"
        return self._expect(key, expected, lambda v: _integers(v, length))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""

        def read(value: object) -> tuple[str, ...] | None:
            fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
            return tuple(value) if fits and isinstance(value, list) else None

        return self._expect(key, "a list of strings", read)

    def map(self, key: str) -> Fields:
        """The fields of a map inside this one."""
        if key not in self._value:
            raise self.error(key, "a map")
        subject = f"{key} of {self.subject}" if self.subject else key
        return Fields(self._value[key], self.where, subject)

    def items(self, kind: str) -> Iterator[tuple[str, Fields]]:
        """Every key with the fields of its map; `kind` is what each is, as in "tensor"."""
        for name, value in self._value.items():
            plain = name.isprintable() and len(name) <= 80
            yield name, Fields(value, self.where, f"{kind} {name if plain else shown(name)}")

    def _expect(self, key: str, expected: str, read: Callable[[Any], T | None]) -> T:
        value = read(self._value.get(key))
        if value is None:
            raise self.error(key, expected)
        return value


def _invalid(what: str, where: Path | str, expected: str, got: str) -> CheckpointError:
    return CheckpointError(
        f"invalid {what} in {where}: expected {expected}, got {got}; fold the original again"
    )


def _integer(value: object, most: int) -> int | None:
    # By exact type, since True would pass as an int.
    return value if type(value) is int and 0 <= value <= most else None


def _number(value: object) -> float | None:
    if type(value) not in (int, float):
        return None
    assert isinstance(value, int | float)
    return float(value) if abs(value) < 2.0**127 else None  # NaN compares false


def _integers(value: object, length: int) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) != length:
        return None
    fits = all(_integer(item, MAX_SIZE) is not None for item in value)
    return tuple(value) if fits else None


def _decoded(value: object) -> bytes | None:
    try:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except ValueError:
        return None
