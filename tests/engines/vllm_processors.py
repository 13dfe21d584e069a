"""Tokenizers and processors for the tiny models that see pictures: vLLM starts none without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

Vocabulary = dict[int, str]
_NEWLINES = {94: "\n", 95: "\n\n", 96: "\n\n\n", 97: "\n\n\n\n"}


def _tokenizer(vocabulary: int, named: Vocabulary, **special: str) -> Any:
    named = {**named, **_NEWLINES}
    words = {i: named.get(i, f"w{i}") for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in words.items()}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
        additional_special_tokens=list(named.values()),
        extra_special_tokens=special,
    )


def _gemma3(vocabulary: int) -> Any:
    names = {90: "<image_soft_token>", 91: "<start_of_image>", 92: "<end_of_image>"}
    special = dict(zip(("image_token", "boi_token", "eoi_token"), names.values(), strict=True))
    return transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size={"height": 8, "width": 8}),
        _tokenizer(vocabulary, names, **special),
        image_seq_length=4,
    )


def _paligemma(vocabulary: int) -> Any:
    images = transformers.SiglipImageProcessor(size={"height": 8, "width": 8})
    images.image_seq_length = 16
    names = {90: "<image>"}
    tokenizer = _tokenizer(vocabulary, names, image_token="<image>")
    return transformers.PaliGemmaProcessor(images, tokenizer)


def _qwen3_5(vocabulary: int) -> Any:
    names = {
        90: "<|image_pad|>",
        91: "<|video_pad|>",
        92: "<|vision_start|>",
        93: "<|vision_end|>",
    }
    special = ("image_token", "video_token", "vision_bos_token", "vision_eos_token")
    sizes = {"size": {"shortest_edge": 64, "longest_edge": 1024}}
    shape = {"patch_size": 2, "temporal_patch_size": 2, "merge_size": 2, **sizes}
    return transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(**shape),
        _tokenizer(vocabulary, names, **dict(zip(special, names.values(), strict=True))),
        transformers.Qwen3VLVideoProcessor(**shape),
    )


_PROCESSORS: dict[str, Callable[[int], Any]] = {
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5,
}


def save_processor(model_type: str, folder: Path, vocabulary: int) -> None:
    """Write the processor of a model that sees pictures; nothing for the others."""
    if model_type in _PROCESSORS:
        _PROCESSORS[model_type](vocabulary).save_pretrained(folder)
