"""Tiny, real models of every family whose norms are zero-centred, two layers or so each.

`CONFIGS` holds what makes a family's default config small and `CLASSES` the class its checkpoints
name; `build` gives the model, with norm weights as wild as real ones, and `inputs` something that
it can run on, pictures included where a zero-centred norm sits behind them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 96
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_IDS = {"image_token_id": 90, "video_token_id": 91}
_QWEN_IDS = {**_IDS, "vision_start_token_id": 92, "vision_end_token_id": 93}

_GEMMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_GEMMA2 = {
    **_GEMMA,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 2,
}
_SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
_MINICPM_VISION: dict[str, Any] = {
    **_SIGLIP,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "insert_layer_id": 0,
}
_QWEN: dict[str, Any] = {
    **_GEMMA,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MOE = {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
_MUSE_VISION: dict[str, Any] = {
    "patch_size": 2,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "layer_types": ["full_attention"],
}
_MUSE_TEXT: dict[str, Any] = {
    **_GEMMA,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "layer_rope_theta": [10000.0, 0],
}
_MUSE_OUTER = {**_IDS, "out_hidden_size": 16, "projector_hidden_size": 16}


def _text(model_type: str, values: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **values, **more}


def _minicpm(vision_type: str) -> dict[str, Any]:
    return {
        "text_config": _text("qwen3_5_text", _QWEN),
        "vision_config": {**_MINICPM_VISION, "model_type": vision_type},
        "insert_layer_id": 0,
        **_IDS,
    }


_PALIGEMMA: dict[str, Any] = {
    "text_config": _text("gemma", _GEMMA, num_image_tokens=16),
    "vision_config": {**_SIGLIP, "projection_dim": 32, "vision_use_head": False},
    "image_token_index": 90,
    "projection_dim": 32,
    "hidden_size": 32,
    "vocab_size": VOCAB,
}
_GEMMA3_OUTER: dict[str, Any] = {
    "text_config": _text("gemma3_text", _GEMMA2),
    "vision_config": _SIGLIP,
    "mm_tokens_per_image": 4,
    "image_token_index": 90,
    "boi_token_index": 91,
    "eoi_token_index": 92,
}
_VIDEOPRISM_VISION: dict[str, Any] = {
    "image_size": 8,
    "num_frames": 2,
    "tubelet_size": [1, 4, 4],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_spatial_layers": 1,
    "num_temporal_layers": 1,
    "num_auxiliary_layers": 1,
}
_MOONSHINE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}

#: model type -> what to change in its default config.
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gemma3": _GEMMA3_OUTER,
    "shieldgemma2": {**_GEMMA3_OUTER, "yes_token_index": 5, "no_token_index": 6},
    "paligemma": _PALIGEMMA,
    "colpali": {"vlm_config": {"model_type": "paligemma", **_PALIGEMMA}, "embedding_dim": 8},
    "pi0": {
        "vlm_config": {"model_type": "paligemma", **_PALIGEMMA},
        "dit_config": _text("gemma", _GEMMA),
        "chunk_size": 2,
        "max_state_dim": 4,
        "max_action_dim": 4,
        "num_inference_steps": 2,
    },
    "vaultgemma": _GEMMA2,
    "recurrent_gemma": {
        **_GEMMA,
        "num_hidden_layers": 3,
        "lru_width": 32,
        "attention_window_size": 4,
        "num_key_value_heads": 1,
    },
    "t5gemma": {
        "encoder": _text("t5_gemma_module", _GEMMA2),
        "decoder": _text("t5_gemma_module", _GEMMA2, cross_attention_hidden_size=32),
        "vocab_size": VOCAB,
    },
    "t5gemma2": {
        "encoder": {
            **_GEMMA3_OUTER,
            "model_type": "t5gemma2_encoder",
            "text_config": _text("t5gemma2_text", _GEMMA2),
        },
        "decoder": _text("t5gemma2_decoder", _GEMMA2),
        "image_token_index": 90,
        "eoi_token_index": 92,
        "vocab_size": VOCAB,
    },
    "qwen3_next": {**_QWEN, **_MOE},
    "qwen3_5_text": _QWEN,
    "qwen3_5_moe_text": {**_QWEN, **_MOE},
    "qwen3_5": {"text_config": _QWEN, "vision_config": _QWEN_VISION, **_QWEN_IDS},
    "qwen3_5_moe": {
        "text_config": {**_QWEN, **_MOE},
        "vision_config": _QWEN_VISION,
        **_QWEN_IDS,
    },
    "jev": {"text_config": _text("qwen3_5_text", _QWEN), "hidden_size": 32},
    "minicpmv4_6": _minicpm("minicpmv4_6_vision"),
    "minicpmv4_7": _minicpm("minicpmv4_7_vision"),
    "minicpm_ocr": _minicpm("minicpm_ocr_vision"),
    "qwen4_exp": {
        "text_config": {
            **_QWEN,
            **_MOE,
            "layer_types": ["linear_attention", "full_attention"],
            "hc_count": 2,
            "hc_lowrank": 8,
            "ple_layer_ids": [1],
            "ple_embed_dim": 16,
            "ngram_size": 2,
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 2,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
        "vision_config": _QWEN_VISION,
        **_QWEN_IDS,
    },
    "nemotron": {**_GEMMA, "num_key_value_heads": 2},
    "step3p7": {
        "text_config": {
            **_GEMMA,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 10000.0}
                for kind in ("sliding_attention", "full_attention")
            },
            "mlp_layer_types": ["dense", "sparse"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "share_expert_dim": 16,
            "num_sliding_attention_heads": 4,
            "query_pre_attn_scalar": 8,
        },
        "vision_config": {**_SIGLIP, "model_type": "step3p5_vision", "image_size": 8},
        "image_token_id": 90,
    },
    "minimax_m3_vl": {
        "text_config": {
            **_GEMMA,
            "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["full_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "dense_intermediate_size": 48,
            "shared_intermediate_size": 16,
            "rotary_dim": 4,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_block_size": 4,
            "index_topk_blocks": 2,
        },
        "vision_config": {**_SIGLIP, "model_type": "minimax_m3_vl_vision"},
        "image_token_index": 90,
        "video_token_index": 91,
        "projector_hidden_size": 32,
    },
    "muse_glimmer": {
        "text_config": _MUSE_TEXT,
        "vision_config": _MUSE_VISION,
        **_MUSE_OUTER,
    },
    "muse_spark": {
        "text_config": {
            **_MUSE_TEXT,
            "moe_intermediate_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_hidden_size": 16,
            "mlp_layer_types": ["dense", "sparse"],
        },
        "vision_config": _MUSE_VISION,
        "audio_config": {
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
            "out_hidden_size": 32,
        },
        "audio_token_id": 94,
        **_MUSE_OUTER,
    },
    "videoprism": {
        "text_config": {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
        },
        "vision_config": _VIDEOPRISM_VISION,
    },
    "moonshine_streaming": {
        "encoder_config": {**_MOONSHINE, "sliding_windows": [[4, 1], [4, 0]]},
        "vocab_size": VOCAB,
        **_MOONSHINE,
        "decoder_start_token_id": 1,
        **_TOKENS,
    },
}

#: model type -> the class that its checkpoints name.
CLASSES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "shieldgemma2": "ShieldGemma2ForImageClassification",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "colpali": "ColPaliForRetrieval",
    "pi0": "PI0ForConditionalGeneration",
    "vaultgemma": "VaultGemmaForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
    "t5gemma": "T5GemmaForConditionalGeneration",
    "t5gemma2": "T5Gemma2ForConditionalGeneration",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "jev": "JevForDecision",
    "minicpmv4_6": "MiniCPMV4_6ForConditionalGeneration",
    "minicpmv4_7": "MiniCPMV4_7ForConditionalGeneration",
    "minicpm_ocr": "MiniCPMOcrForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
    "nemotron": "NemotronForCausalLM",
    "step3p7": "Step3p7ForConditionalGeneration",
    "minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration",
    "muse_glimmer": "MuseGlimmerForConditionalGeneration",
    "muse_spark": "MuseSparkForConditionalGeneration",
    "videoprism": "VideoPrismClipModel",
    "moonshine_streaming": "MoonshineStreamingForConditionalGeneration",
}


def available() -> list[str]:
    """Families that the installed transformers has; all of them in the newest one."""
    return [name for name in CONFIGS if name in CONFIG_MAPPING]


def build(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model with random weights. Every gain is random too, so that a wrong one shows."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**CONFIGS[model_type])
    return fill(getattr(transformers, CLASSES[model_type])(config), dtype)


def fill(model: Any, dtype: torch.dtype) -> Any:
    """The model in `dtype`, with gains that are random and no projector that is zero."""
    model = model.to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.rpartition(".")[2] in ("weight", "gamma"):
                parameter.normal_(std=0.5)
            elif parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02)  # a projector that starts at zero hides its norm
    return model


def save(model_type: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint as transformers writes it."""
    build(model_type, dtype).save_pretrained(folder)
    return folder


def with_norms_near_0(source: Path, out: Path) -> Path:
    """A copy of a checkpoint whose norms' weights are where gamma - 1 has lost the most."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensors[name] = 1e-7 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def inputs(model_type: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What to call a model of this family with."""
    generator = torch.Generator().manual_seed(1)

    def ids(*lead: int, tokens: int = 7) -> torch.Tensor:
        row = torch.randint(3, 88, (1, tokens), generator=generator)
        return torch.cat([torch.tensor([lead], dtype=torch.long), row], 1) if lead else row

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    picture = {"pixel_values": noise(1, 3, 8, 8)}
    if model_type in ("gemma3", "shieldgemma2"):
        text = ids(91, *[90] * 4, 92)
        return {"input_ids": text, "token_type_ids": (text == 90).long(), **picture}
    if model_type in ("paligemma", "colpali"):
        text = ids(*[90] * 16)
        return {"input_ids": text, "attention_mask": torch.ones_like(text), **picture}
    if model_type == "pi0":
        text = ids(*[90] * 16)
        return {
            "input_ids": text,
            "attention_mask": torch.ones_like(text),
            "pixel_values": noise(1, 1, 3, 8, 8),
            "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
            "state": noise(1, 4),
            "actions": noise(1, 2, 4),
            "noise": noise(1, 2, 4),
            "timestep": torch.full((1,), 0.5, dtype=dtype),
        }
    if model_type == "t5gemma":
        return {"input_ids": ids(), "decoder_input_ids": ids(tokens=5)}
    if model_type == "t5gemma2":
        return {"input_ids": ids(91, *[90] * 4, 92), "decoder_input_ids": ids(tokens=5), **picture}
    if model_type == "videoprism":
        return {"pixel_values_videos": noise(1, 2, 3, 8, 8), "input_ids": ids()}
    if model_type == "jev":
        return {
            "input_ids": ids(),
            "marks": torch.tensor([[3, 6]]),
            "num_options": torch.tensor([[2, 2]]),
            "question_type_ids": torch.tensor([[0, 1]]),
        }
    if model_type == "moonshine_streaming":
        return {"input_values": noise(1, 3200), "decoder_input_ids": ids(tokens=5)}
    return {"input_ids": ids()}
