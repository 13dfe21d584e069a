"""Small checkpoints, written through the safetensors library, and how to compare folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

HIDDEN, HEAD, LAYERS, VOCAB = 24, 8, 3, 32
NORMS = {
    "input_layernorm": HIDDEN,
    "post_attention_layernorm": HIDDEN,
    "pre_feedforward_layernorm": HIDDEN,
    "post_feedforward_layernorm": HIDDEN,
    "self_attn.q_norm": HEAD,
    "self_attn.k_norm": HEAD,
}
CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": HIDDEN,
    "head_dim": HEAD,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_hidden_layers": LAYERS,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
}

Tensors = dict[str, np.ndarray[Any, Any]]


def gemma3_tensors(dtype: Any = ml_dtypes.bfloat16, seed: int = 0) -> Tensors:
    """The tensors of a tiny Gemma 3 text model, with norm weights as wild as real ones."""
    rng = np.random.default_rng(seed)

    def make(*shape: int) -> np.ndarray[Any, Any]:
        return (rng.standard_normal(shape) * 10.0 ** rng.integers(-9, 3, shape)).astype(dtype)

    tensors = {"model.embed_tokens.weight": make(VOCAB, HIDDEN), "model.norm.weight": make(HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, size in NORMS.items():
            tensors[f"{prefix}.{name}.weight"] = make(size)
        tensors[f"{prefix}.self_attn.q_proj.weight"] = make(3 * HEAD, HIDDEN)
        tensors[f"{prefix}.mlp.up_proj.weight"] = make(5, HIDDEN)
    return tensors


def is_norm(name: str) -> bool:
    """Whether a tensor of `gemma3_tensors` is one of its norms: all of them are zero-centred."""
    return name.endswith("norm.weight")


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    shards: int = 1,
) -> Path:
    """Write a checkpoint folder with the files that people have beside the weights."""
    tensors = gemma3_tensors() if tensors is None else dict(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG, indent=1))
    (folder / "generation_config.json").write_text('{"do_sample": true}\n')
    (folder / "tokenizer.json").write_bytes(bytes(range(256)) * 8)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "2_Dense").mkdir(exist_ok=True)
    (folder / "2_Dense" / "config.json").write_text("{}")
    write_weights(folder, tensors, shards)
    return folder


def write_weights(folder: Path, tensors: Mapping[str, Any], shards: int) -> None:
    """Write `model.safetensors`, or several shards with their index."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Every file below `folder` is afterwards what it was."""
    before = tree(folder)
    yield
    assert tree(folder) == before


def flipped(name: str, at: int = -1) -> Callable[[Path], None]:
    """Flips the last bit of one byte of the file `name` of a folder."""

    def edit(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[at] ^= 1
        (folder / name).write_bytes(raw)

    return edit


def read_tensors(folder: Path) -> Tensors:
    """Every tensor at the top of `folder`, read through the safetensors library."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors
