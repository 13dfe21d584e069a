"""Files of every format, right and wrong, made from a small original with NumPy and `gguf` alone.

Which norms are zero-centred comes from tests/data/norms.json, measured in transformers, and GGUF's
names from the tensor maps of llama.cpp's own package: neither is asked of the code under test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from checkpoints import Tensors, read_tensors
from gguf.tensor_mapping import get_tensor_name_map
from safetensors.numpy import save_file

FACTS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data/norms.json").read_text())
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
Array = np.ndarray[Any, Any]

#: llama.cpp's architecture of each family.
GGUF_ARCHITECTURES = {
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "qwen3_next": gguf.MODEL_ARCH.QWEN3NEXT,
    "qwen3_5_text": gguf.MODEL_ARCH.QWEN35,
    "nemotron": gguf.MODEL_ARCH.NEMOTRON,
    "step3p7": gguf.MODEL_ARCH.STEP35,
    "gemma3n_text": gguf.MODEL_ARCH.GEMMA3N,
    "gemma4_text": gguf.MODEL_ARCH.GEMMA4,
    "llama": gguf.MODEL_ARCH.LLAMA,
}
_PRE = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_QK = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_MINIMAX = {
    **_PRE,
    **_QK,
    "self_attn.index_q_norm": "indexer.q_norm",
    "self_attn.index_k_norm": "indexer.k_norm",
    "self_attn.indexer.q_norm": "indexer.q_norm",
    "self_attn.indexer.k_norm": "indexer.k_norm",
    "norm": "output_norm",
}
#: Those that the package does not know yet: the architecture, and what it calls the norms by what
#: follows `layers.N.` or the root, as gguf-py/gguf/constants.py of llama.cpp has it.
NEWER_ARCHITECTURES = {
    "minimax_m3_vl_text": ("minimax-m3", _MINIMAX),
    "minimax_m3_vl": ("minimax-m3", _MINIMAX),
    "muse_glimmer_text": (
        "muse-glimmer",
        {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
            "norm": "output_norm",
        },
    ),
    "qwen4_exp_text": (
        "qwen4exp",
        {
            **_QK,
            "attn_hyper_connection.hc_norm": "hc_attn_norm",
            "mlp_hyper_connection.hc_norm": "hc_ffn_norm",
            "self_attn.indexer.q_layernorm": "indexer.q_norm",
            "self_attn.indexer.k_layernorm": "indexer.k_norm",
            "ple.norm_key": "ple_norm_key",
            "ple.norm_query": "ple_norm_query",
            "ple.norm_conv": "ple_norm_conv",
            "linear_attn.norm": "ssm_norm",
            "hyper_connection_mixer.hc_norm": "output_hc_norm",
        },
    ),
}
_IN_LAYER = re.compile(r"(?:model\.|language_model\.)*(?:layers\.(\d+)\.)?(.+)\.weight")
#: Families for which MLX's `sanitize` adds 1 once and for all.
MLX_ADDS = ("qwen3_next", "qwen3_5_text", "step3p7")
#: What tools write into config.json beside the original's.
QUANTIZERS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
}


@dataclass(frozen=True)
class Norm:
    """A norm of the original: `zero_centred` as measured."""

    w: Array
    zero_centred: bool


#: Name and norm -> what a file holds of it, `held` being how often the offset belongs in it.
Change = Callable[[str, Norm, int], Array]


def one(dtype: Any = np.float32) -> Any:
    return np.ones((), dtype)


def norms_of(folder: Path) -> dict[str, Norm]:
    """Every norm of an original, as float32."""
    family = json.loads((folder / "config.json").read_text())["model_type"]
    facts = FACTS.get(family, {"zero_centred": [], "plain": []})
    found = {}
    for name, tensor in read_tensors(folder).items():
        pattern = _INDEX.sub("{i}", name)
        if pattern in facts["zero_centred"]:
            found[name] = Norm(tensor.astype(np.float32), True)
        elif pattern in facts["plain"] or (tensor.ndim == 1 and name.endswith("norm.weight")):
            assert not facts["zero_centred"] or pattern in facts["plain"], name
            found[name] = Norm(tensor.astype(np.float32), False)
    return found


def added(times: int, extra: int = 0) -> Change:
    """The offset `times` more often than belongs there; `extra` for plain norms."""

    def change(name: str, norm: Norm, held: int) -> Array:
        count = held + times if norm.zero_centred else extra
        return norm.w + np.float32(count)

    return change


right = added(0)


def rounded(dtype: Any) -> Change:
    """Through gamma in a 16-bit dtype, and back where w belongs."""

    def change(name: str, norm: Norm, held: int) -> Array:
        if not norm.zero_centred:
            return norm.w
        gamma = (norm.w + one()).astype(dtype)
        return (gamma if held else gamma - one(dtype)).astype(np.float32)

    return change


def only(chosen: str, how: Callable[[Array], Array]) -> Change:
    """`how` on the norms whose name holds `chosen`; the others are right."""

    def change(name: str, norm: Norm, held: int) -> Array:
        values = right(name, norm, held)
        return how(values) if chosen in name else values

    return change


def channels(size: int) -> Array:
    """Factors as AWQ has them, the same for the same size."""
    return np.exp(np.random.default_rng(size).normal(0, 0.4, size)).astype(np.float32)


def scaled_gain(name: str, norm: Norm, held: int) -> Array:
    """As AWQ should: gain / s, stored again as w."""
    if "input_layernorm" not in name:
        return right(name, norm, held)
    gain = (norm.w + one()) / channels(norm.w.size)
    return (gain - np.float32(1 - held)).astype(ml_dtypes.bfloat16).astype(np.float32)


def scaled_w(name: str, norm: Norm, held: int) -> Array:
    """As AWQ did: w / s."""
    if "input_layernorm" not in name:
        return right(name, norm, held)
    scaled = (norm.w / channels(norm.w.size)).astype(ml_dtypes.bfloat16).astype(np.float32)
    return scaled + np.float32(held)


def swapped(norms: Mapping[str, Norm]) -> Change:
    """Layers 0 and 1 in each other's place."""

    def change(name: str, norm: Norm, held: int) -> Array:
        other = re.sub(r"layers\.([01])\.", lambda m: f"layers.{1 - int(m[1])}.", name)
        return right(name, norms.get(other, norm), held)

    return change


def write_gguf(
    original: Path, path: Path, change: Change = right, dtype: Any = np.float32, drop: str = ""
) -> Path:
    """A GGUF file as llama.cpp's converter names it, with a vocabulary and a matrix."""
    config = json.loads((original / "config.json").read_text())
    config |= config.get("text_config", {}) | {"model_type": config["model_type"]}
    architecture, named = _gguf_names(config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_token_list([f"token {n}" for n in range(1000)])
    writer.add_token_scores([0.5] * 1000)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    for name, norm in norms_of(original).items():
        if drop and drop in name:
            continue
        stored = named(name)
        if stored is None:
            assert "vision" in name, name
            continue
        values = change(name, norm, 1).astype(dtype)
        if dtype == ml_dtypes.bfloat16:
            writer.add_tensor(
                stored,
                values.view(np.uint8),
                raw_dtype=gguf.GGMLQuantizationType.BF16,
            )
        else:
            writer.add_tensor(stored, values)
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    """Write what it was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_names(config: Mapping[str, Any]) -> tuple[str, Callable[[str], str | None]]:
    """The architecture of a family, and what it calls a tensor of transformers."""
    family = config["model_type"]
    if family in GGUF_ARCHITECTURES:
        known = get_tensor_name_map(GGUF_ARCHITECTURES[family], config["num_hidden_layers"])
        architecture = gguf.MODEL_ARCH_NAMES[GGUF_ARCHITECTURES[family]]
        return architecture, lambda name: known.get_name(name, try_suffixes=(".weight",))
    architecture, names = NEWER_ARCHITECTURES[family]

    def stored(name: str) -> str | None:
        found = _IN_LAYER.fullmatch(name)
        if found is None or found[2] not in names:
            return None
        layer = f"blk.{found[1]}." if found[1] else ""
        return f"{layer}{names[found[2]]}.weight"

    return architecture, stored


def write_folder(
    original: Path,
    folder: Path,
    change: Change = right,
    *,
    config: Mapping[str, Any] | None = None,
    prefix: str = "",
    metadata: Mapping[str, str] | None = None,
    held: int = 0,
    dtype: Any = None,
    drop: str = "",
) -> Path:
    """A safetensors folder with the original's tensors, its norms changed, and a changed config."""
    folder.mkdir(parents=True)
    settings = json.loads((original / "config.json").read_text()) | dict(config or {})
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = read_tensors(original)
    for name, norm in norms_of(original).items():
        kind = dtype or tensors[name].dtype
        tensors[name] = change(name, norm, held if norm.zero_centred else 0).astype(kind)
    kept = {prefix + n: t for n, t in tensors.items() if not drop or drop not in n}
    save_file(kept, folder / "model.safetensors", metadata=dict(metadata or {"format": "pt"}))
    return folder


def write_mlx(original: Path, folder: Path, change: Change = right, **more: Any) -> Path:
    """A folder as mlx-lm's `convert -q` leaves it: gamma for the families that `sanitize` folds."""
    family = json.loads((original / "config.json").read_text())["model_type"]
    return write_folder(
        original,
        folder,
        change,
        config={"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}},
        metadata={"format": "mlx"},
        held=int(family in MLX_ADDS),
        **more,
    )


def write_arrays(original: Path, folder: Path, change: Change = right) -> list[str]:
    """`NAME=FILE.npy` of every norm as a runtime holds it: gamma."""
    folder.mkdir(parents=True)
    given = []
    for number, (name, norm) in enumerate(norms_of(original).items()):
        np.save(folder / f"{number}.npy", change(name, norm, int(norm.zero_centred)))
        given.append(f"{name}={folder / f'{number}.npy'}")
    return given


def from_facts(family: str, folder: Path) -> Path:
    """Two layers of nothing but the norms that were measured of a plain family."""
    rng = np.random.default_rng(6)
    tensors: Tensors = {"model.embed_tokens.weight": np.zeros((8, 32), ml_dtypes.bfloat16)}
    for pattern in FACTS[family]["plain"]:
        for layer in range(2 if "{i}" in pattern else 1):
            if pattern.startswith("model.") and pattern.endswith("norm.weight"):
                w = rng.normal(1, 0.3, 32).astype(ml_dtypes.bfloat16)
                tensors[pattern.replace("{i}", str(layer))] = w
    folder.mkdir(parents=True)
    config = {"model_type": family, "num_hidden_layers": 2, "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plain_llama(folder: Path) -> Path:
    """A family whose norms are plain, to which a converter may add 1 all the same."""
    rng = np.random.default_rng(5)
    tensors: Tensors = {"model.embed_tokens.weight": np.zeros((8, 32), ml_dtypes.bfloat16)}
    for name in ("input_layernorm", "post_attention_layernorm"):
        for layer in range(2):
            w = rng.normal(1, 0.3, 32).astype(ml_dtypes.bfloat16)
            tensors[f"model.layers.{layer}.{name}.weight"] = w
    tensors["model.norm.weight"] = rng.normal(1, 0.3, 32).astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
