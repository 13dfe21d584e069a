"""CTranslate2: its TransformersConverter, then its Generator with the result."""

from __future__ import annotations

from pathlib import Path

import ctranslate2
import numpy as np
import probe
from ctranslate2.converters import TransformersConverter


class Converter(TransformersConverter):
    """Without the tokenizer, which a tiny checkpoint lacks."""

    def load_tokenizer(self, *_: object, **__: object) -> object:
        return Tokenizer()


class Tokenizer:
    """What the converter asks of one."""

    bos_token = unk_token = eos_token = pad_token = "<0>"
    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {f"<{number}>": number for number in range(96)}


def load(checkpoint: Path, folder: Path) -> object:
    Converter(str(checkpoint)).convert(str(folder / "out"))
    model = ctranslate2.Generator(str(folder / "out"), compute_type="float32")
    # Its prompt must not be longer than the sliding window, which is 4.
    return np.array(model.forward_batch([["<2>", "<3>", "<4>"]]))[0, -1].tolist()


if __name__ == "__main__":
    probe.report("ctranslate2", load)
