"""The original's norms, and what they become where the offset is added and rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3

from gemma_fold.compare.offsets.expectation import NormRule
from gemma_fold.compare.weights.norms import ROUNDINGS
from gemma_fold.format.arithmetic import Float32


@dataclass(frozen=True, slots=True)
class Original:
    """A norm of the original: `values` is w, or gamma where `added` is 1."""

    rule: NormRule
    values: Float32
    added: int

    def w(self) -> Float32:
        """The stored weight; of a gamma, as near as float32 subtraction comes to it."""
        if not self.added:
            return self.values
        with np.errstate(over="ignore", invalid="ignore"):
            w: Float32 = self.values - np.float32(self.rule.offset)
        return w

    def exact(self, additions: int) -> Float32:
        """w with the offset added so many times, each sum in float32."""
        values, start = (self.values, 1) if self.added and additions > 0 else (self.w(), 0)
        offset = np.float32(self.rule.offset)
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(start, additions):
                values = values + offset
            for _ in range(additions, 0):
                values = values - offset
        return values

    def rounded(self, additions: int) -> Iterator[tuple[str, Float32]]:
        """Every way in which `exact` is rounded by those who do, with the name of the rounding."""
        offset = np.float32(self.rule.offset)
        with np.errstate(over="ignore", invalid="ignore"):
            for how, step in ROUNDINGS.items():
                yield how, step(self.exact(additions))
            for how, step in ROUNDINGS.items():
                values = step(self.exact(1))
                if additions == 0:
                    yield how + " as 1 + w", step(values - offset)
                for _ in range(1, additions):
                    yield how + " before the last sum", values + offset
                    values = step(values + offset)
                if additions > 1:
                    yield how + " at each sum", values


@dataclass(slots=True)
class Catalogue:
    """All norms of the original, to find those that are in another's place."""

    originals: Mapping[str, Original]
    _places: dict[bytes, str] = field(default_factory=dict)

    def owner(self, values: Float32) -> str | None:
        """The norm whose w or gamma `values` is, in float32 or rounded."""
        if not self._places:
            for key, original in self.originals.items():
                for additions in (0, 1, 2):
                    forms = [original.exact(additions)]
                    forms += [v for _, v in original.rounded(additions)]
                    for form in forms:
                        self._places.setdefault(_digest(form), key)
        return self._places.get(_digest(values))


def _digest(values: Float32) -> bytes:
    return blake3((values + np.float32(0)).tobytes()).digest(16)  # -0.0 is 0.0
