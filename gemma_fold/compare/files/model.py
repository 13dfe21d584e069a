"""What every reader comes to: norm-like tensors by name, and what the format says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_fold.checkpoint.header import ITEMSIZE
from gemma_fold.checkpoint.names import shown
from gemma_fold.errors import CheckpointError
from gemma_fold.format.arithmetic import Float32, decode, is_foldable_dtype

#: Bytes of one norm; the widest model there is needs a hundredth of it.
MOST_BYTES = 16 << 20
#: Elements of all norms of a file together; the largest model there is has a tenth of it.
_MOST_ELEMENTS = 1 << 26
#: Where wrappers put a language model: what may stand before a name without changing what it says.
_WRAPPERS = frozenset(
    {"base_model", "language_model", "llm", "model", "module", "text_model", "transformer"}
)
#: How vendors spell norms that transformers spells otherwise, where any name holds the mark. In the
#: second, one name means another norm.
_SPELLINGS = (
    (".index_q_norm.", {"index_q_norm": "indexer.q_norm", "index_k_norm": "indexer.k_norm"}),
    (
        ".post_attn_norm.",
        {
            "post_attn_norm": "post_attention_layernorm",
            "post_attention_layernorm": "pre_feedforward_layernorm",
            "post_ffn_norm": "post_feedforward_layernorm",
        },
    ),
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A one-dimensional tensor of a file.

    Attributes:
        stored: its name in the file.
        dtype: as safetensors spells it, or the format's own word for one that cannot be compared.
        size: elements.
    """

    stored: str
    dtype: str
    size: int

    @property
    def is_comparable(self) -> bool:
        """Whether its numbers can be read as those of a norm."""
        return is_foldable_dtype(self.dtype) or self.dtype == "F64"

    @property
    def length(self) -> int:
        """Bytes to read; 0 for one that cannot be compared."""
        return self.size * int(ITEMSIZE[self.dtype]) if self.is_comparable else 0


@dataclass(frozen=True, slots=True)
class NormFile:
    """One side of a check.

    Attributes:
        name: as it was given.
        format: which table of `expectation` says what its norms hold.
        tool: what wrote it or how it is quantized, as far as the file tells, for people.
        config: as of config.json; made from the header where the format has none.
        tensors: by the name that transformers gives them.
        read: the stored bytes of tensors, by those names.
        size: bytes of all its weights.
        header_bytes: what was read to know all this.
        commit: of a Hub source.
    """

    name: str
    format: str
    tool: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    read: Callable[[Collection[str]], Mapping[str, bytes]]
    size: int
    header_bytes: int
    commit: str | None = None

    def values(self, names: Collection[str]) -> dict[str, Float32 | None]:
        """Tensors as float32; None for those of a dtype that cannot be compared.

        Raises CheckpointError for one that is larger than any norm, or too many of them.
        """
        chosen = {name: self.tensors[name] for name in names}
        for tensor in chosen.values():
            if tensor.size > MOST_BYTES // 8:
                raise CheckpointError(
                    f"{shown(tensor.stored)} has {tensor.size} elements, more than any norm; "
                    "fetch the file again"
                )
        total = sum(tensor.size for tensor in chosen.values())
        if total > _MOST_ELEMENTS:
            raise CheckpointError(
                f"the norms of {self.name} have {total} elements, more than those of any model; "
                "fetch the file again"
            )
        raw = self.read([name for name, t in chosen.items() if t.is_comparable])
        return {n: _widened(raw[n], t.dtype) if n in raw else None for n, t in chosen.items()}


def _widened(raw: bytes, dtype: str) -> Float32:
    if dtype == "F64":
        with np.errstate(over="ignore", invalid="ignore"):
            return np.frombuffer(raw, "<f8").astype(np.float32)
    return decode(raw, dtype)


def canonical(name: str) -> str:
    """A tensor's name without the models that merely wrap its own."""
    parts = name.split(".")
    while len(parts) > 2 and parts[0] in _WRAPPERS:
        del parts[0]
    return ".".join(parts)


def by_canonical_name(names: Collection[str]) -> dict[str, str]:
    """Canonical name in transformers' spelling -> name; names that would be one keep theirs."""
    spelled = {name: canonical(name) for name in names}
    for mark, spelling in _SPELLINGS:
        if any(mark in name for name in names):
            spelled = {name: _respelled(short, spelling) for name, short in spelled.items()}
    count = Counter(spelled.values())
    return {short if count[short] == 1 else name: name for name, short in spelled.items()}


def _respelled(name: str, spelling: Mapping[str, str]) -> str:
    return ".".join(spelling.get(part, part) for part in name.split("."))
