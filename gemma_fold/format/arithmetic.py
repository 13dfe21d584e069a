"""The arithmetic, both ways: gamma = offset + w and back, on raw little-endian tensor bytes.

numpy has no bfloat16, so bf16 travels as its upper sixteen bits of a float32. Everything here is
element-wise and exact to the bit: what the reference forward would have computed from the stored w.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gemma_fold.checkpoint.fields import Fields
from gemma_fold.errors import CheckpointError
from gemma_fold.rules import Fold

Float32 = npt.NDArray[np.float32]

#: Storage dtypes a norm weight may have, with the integer type that carries their bits.
_BITS: dict[str, np.dtype[np.generic]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<u2"),
    "F32": np.dtype("<u4"),
}
FOLDABLE_DTYPES = tuple(_BITS)


def is_foldable_dtype(dtype: str) -> bool:
    """Whether a norm weight stored as `dtype` (a safetensors name) can be folded exactly."""
    return dtype in _BITS


def decode(raw: bytes, dtype: str) -> Float32:
    """Widen stored bytes to float32, exactly. `dtype` is BF16, F16 or F32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        with np.errstate(invalid="ignore"):  # a signalling NaN is quieted, as hardware does
            return np.frombuffer(raw, "<f2").astype(np.float32)
    return np.frombuffer(raw, "<f4").astype(np.float32, copy=True)


def encode(values: Float32, dtype: str) -> bytes:
    """Round float32 values to `dtype`, to nearest even, and return the bytes as stored."""
    if dtype == "BF16":
        return _round_to_bf16(values).astype("<u2").tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype("<f2").tobytes()
    return values.astype("<f4").tobytes()


def _round_to_bf16(values: Float32) -> npt.NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    with np.errstate(over="ignore"):
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding up could carry a NaN's payload into infinity: keep the payload's top bits, quieted.
    return np.where(np.isnan(values), (bits >> 16) | 0x0040, rounded).astype(np.uint16)


def fold(raw: bytes, dtype: str, rule: Fold) -> Float32:
    """gamma = fl32(offset + w) of the stored weight `raw`: one float32 sum, whatever the family.

    Where `rule.add_dtype` is storage, the reference rounds that sum to the dtype it computes in;
    so does the folded norm when it is used, which keeps it right at every compute dtype. NaN and
    infinity pass through as IEEE 754 says.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        gamma: Float32 = decode(raw, dtype) + np.float32(rule.offset)
    return gamma


@dataclass(frozen=True, slots=True)
class Exceptions:
    """Stored bits that `cast(gamma - offset)` does not give back, such as a tiny w or -0.0.

    `index` is None if most elements are exceptions: then `bits` holds the whole tensor.
    """

    count: int
    index: bytes | None  # little-endian uint32 positions
    bits: bytes  # the stored elements, in the storage dtype

    def to_json(self) -> dict[str, object]:
        index = None if self.index is None else base64.b64encode(self.index).decode()
        return {"count": self.count, "index": index, "bits": base64.b64encode(self.bits).decode()}

    @classmethod
    def from_json(cls, value: Fields, elements: int, dtype: str) -> Exceptions:
        """Inverse of `to_json` for a tensor of so many elements; CheckpointError if it is not."""
        width = _BITS[dtype].itemsize
        found = cls(
            value.integer("count", elements),
            value.optional("index", value.base64),
            value.base64("bits"),
        )
        listed = elements if found.index is None else found.count
        if len(found.bits) != listed * width:
            raise value.error("bits", f"base64 of {listed} elements of {dtype}")
        if found.index is None:
            return found
        index = np.frombuffer(found.index, "<u4") if len(found.index) == 4 * listed else None
        if index is None or not _ascend(index, elements):
            raise value.error("index", f"base64 of {listed} ascending positions below {elements}")
        return found


def _ascend(index: npt.NDArray[np.uint32], below: int) -> bool:
    if not index.size:
        return True
    return int(index[-1]) < below and bool(np.all(index[1:] > index[:-1]))


def find_exceptions(raw: bytes, dtype: str, gamma: Float32, rule: Fold) -> Exceptions | None:
    """What must be kept beside `gamma` so that `unfold` returns `raw` bit for bit, if anything."""
    stored = np.frombuffer(raw, _BITS[dtype])
    differs = np.flatnonzero(np.frombuffer(_subtract(gamma, dtype, rule), _BITS[dtype]) != stored)
    if not differs.size:
        return None
    sparse_size = differs.size * (4 + stored.itemsize)
    if sparse_size >= len(raw):
        return Exceptions(differs.size, None, raw)
    return Exceptions(differs.size, differs.astype("<u4").tobytes(), stored[differs].tobytes())


def unfold(gamma: Float32, dtype: str, rule: Fold, exceptions: Exceptions | None = None) -> bytes:
    """The stored bytes of w for `gamma`: `cast(gamma - offset)` with the exceptions put back.

    Raises:
        CheckpointError: the exceptions do not fit the tensor.
    """
    restored = _subtract(gamma, dtype, rule)
    if exceptions is None:
        return restored
    if exceptions.index is None:
        if len(exceptions.bits) != len(restored):
            raise CheckpointError("an exception record has the wrong length for its tensor")
        return exceptions.bits
    out: npt.NDArray[Any] = np.frombuffer(restored, _BITS[dtype]).copy()
    index = np.frombuffer(exceptions.index, "<u4")
    bits = np.frombuffer(exceptions.bits, _BITS[dtype])
    if index.size != bits.size or (index.size and int(index.max()) >= out.size):
        raise CheckpointError("an exception record points outside its tensor")
    out[index] = bits
    return bytes(out.tobytes())


def _subtract(gamma: Float32, dtype: str, rule: Fold) -> bytes:
    with np.errstate(over="ignore", invalid="ignore"):
        return encode(gamma - np.float32(rule.offset), dtype)


def count_non_finite(raw: bytes, dtype: str) -> int:
    """How many stored elements are NaN or infinite."""
    return int(np.count_nonzero(~np.isfinite(decode(raw, dtype))))


def count_rounded(gamma: Float32, dtype: Literal["BF16", "F16"]) -> int:
    """How many elements of `gamma` would change if it were stored as `dtype`."""
    changed = decode(encode(gamma, dtype), dtype) != gamma
    return int(np.count_nonzero(changed & ~np.isnan(gamma)))
