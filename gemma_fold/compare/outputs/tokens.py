"""What both sides are asked to read: windows of a text as token ids, and prompts to continue."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemma_fold.compare.sides import Side
from gemma_fold.compare.structure import vocabulary_size
from gemma_fold.errors import CheckpointError, HostError, UsageError, first_line

PROMPTS = (
    "The capital of France is Paris. The capital of Italy is",
    "Photosynthesis is the process by which plants",
    "Once upon a time, in a small village near the sea, there lived",
    "def fibonacci(n):\n    ",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_RANDOM_WINDOWS = 3


class NothingInCommonError(UsageError):
    """The two sides read text differently, so their predictions cannot be compared."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Where a greedy continuation starts: text (empty if ids were drawn), and its ids."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The reading matter of one comparison.

    Attributes:
        windows: token ids, all of one length.
        prompts: for greedy continuations.
        tokenizer: turns ids to text; None if the ids were drawn at random.
        origin: where the ids come from, in words.
    """

    windows: tuple[tuple[int, ...], ...]
    prompts: tuple[Prompt, ...]
    tokenizer: Any
    origin: str

    @property
    def digest(self) -> str:
        """sha256 of windows and prompts: equal for comparisons over the same tokens."""
        return hashlib.sha256(repr((self.windows, self.prompts)).encode()).hexdigest()

    def text(self, ids: tuple[int, ...]) -> str:
        """`ids` as people read them."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return str(self.tokenizer.decode(list(ids)))


def read_text(path: Path | None) -> tuple[str, str]:
    """The text of a file, or the bundled one; and where it is from. Raises UsageError."""
    if path is None:
        return files("gemma_fold.compare.outputs").joinpath("text.txt").read_text(
            "utf-8"
        ), "the bundled text"
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"--text {path} cannot be read ({why}); give a UTF-8 text file") from None
    if not text.strip():
        raise UsageError(f"--text {path} is empty; give a text of a few pages")
    return text, str(path)


def make_tokens(
    a: Side | None,
    b: Side | None,
    text: Path | None,
    context: int,
    prompts: int,
    room: int = 0,
) -> Tokens:
    """Tokenize for the sides that are checkpoints, with `room` left after each window.

    Where neither has a tokenizer, ids are drawn at random (the same ones every time).

    Raises:
        NothingInCommonError: tokenizers or vocabularies differ.
        UsageError: the text is unusable.
    """
    sides = [side for side in (a, b) if side is not None]
    _check_vocabularies(sides)
    context = min([context, *(limit - room for side in sides if (limit := _longest(side.config)))])
    content, origin = read_text(text)
    texts = (content, *PROMPTS[:prompts])
    encoded, tokenizer = _encode(sides, texts)
    if encoded is None:
        if text is not None:
            raise UsageError(f"--text needs a tokenizer, and {sides[0].name} has none")
        return _random_tokens(sides, context, prompts)
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    windows = split_windows(encoded[0], start, context)
    if len(windows[0]) < 2:
        raise UsageError(f"{origin} gives no two tokens to compare; give a longer --text")
    made = [Prompt(t, (*start, *ids)) for t, ids in zip(texts[1:], encoded[1:], strict=True)]
    return Tokens(windows, tuple(made), tokenizer, origin)


def split_windows(ids: list[int], start: list[int], context: int) -> tuple[tuple[int, ...], ...]:
    """Windows of `context` tokens, each led by `start`; a text shorter than one makes one."""
    size = context - len(start)
    if len(ids) <= size:
        return ((*start, *ids),)
    whole = len(ids) // size
    return tuple((*start, *ids[i * size : (i + 1) * size]) for i in range(whole))


def _longest(config: Mapping[str, Any]) -> int | None:
    for part in (config, config.get("text_config"), config.get("decoder")):
        value = part.get("max_position_embeddings") if isinstance(part, Mapping) else None
        if isinstance(value, int) and value > 1:
            return value
    return None


def _check_vocabularies(sides: list[Side]) -> None:
    sizes = [vocabulary_size(side.config) for side in sides]
    if len(sizes) == 2 and None not in sizes and sizes[0] != sizes[1]:
        raise NothingInCommonError(
            f"{sides[0].name} has a vocabulary of {sizes[0]} tokens and {sides[1].name} one of "
            f"{sizes[1]}, so their logits cannot be compared; compare weights with --no-outputs"
        )


def _encode(sides: list[Side], texts: tuple[str, ...]) -> tuple[list[list[int]] | None, Any]:
    found: tuple[list[list[int]] | None, Any] = (None, None)
    for side in sides:
        if side.root is None or not any((side.root / n).is_file() for n in _TOKENIZER_FILES):
            continue
        tokenizer = load_tokenizer(side.root)
        encoded = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        if found[0] is not None and found[0] != encoded:
            raise NothingInCommonError(
                f"the tokenizers of {sides[0].name} and {sides[1].name} split the text "
                "differently, so they have no common text; compare weights with --no-outputs"
            )
        if found[0] is None:
            found = (encoded, tokenizer)
    return found


def load_tokenizer(root: Path) -> Any:
    """The tokenizer of a checkpoint folder. Raises CheckpointError if it does not load."""
    from gemma_fold.compare.outputs.transformers import import_transformers

    try:
        transformers = import_transformers()
    except HostError:
        if find_spec("transformers") is None:
            raise
        transformers = import_module("transformers")  # too old for models, not for tokenizers
    try:
        return transformers.AutoTokenizer.from_pretrained(root)
    except MemoryError:
        raise HostError("out of memory while the tokenizer was loaded") from None
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer of {root} does not load ({first_line(error)}); "
            "restore its files, or compare weights with --no-outputs"
        ) from error


def _random_tokens(sides: list[Side], context: int, prompts: int) -> Tokens:
    vocabulary = vocabulary_size(sides[0].config)
    if vocabulary is None:
        raise UsageError(f"{sides[0].name} has no tokenizer, and its config no vocab_size")
    draw = random.Random(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(n))

    windows = tuple(ids(context) for _ in range(_RANDOM_WINDOWS))
    return Tokens(
        windows,
        tuple(Prompt("", ids(8)) for _ in range(prompts)),
        None,
        "token ids drawn at random, for want of a tokenizer",
    )
