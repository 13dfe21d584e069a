"""Tokenizers as large as the tiny models' vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "".join(chr(code) for code in range(32, 32 + tiny.VOCAB - 5)) + "\n"


def add_tokenizer(folder: Path, letters: str = LETTERS) -> None:
    """A real tokenizer of one token a character, as large as the tiny models' vocabulary."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *letters]
    model = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


def tiny_tokenizer() -> Any:
    """One of words: `w3`, `w4` and so on."""
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, tiny.VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
