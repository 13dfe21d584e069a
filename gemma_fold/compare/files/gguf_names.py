"""What llama.cpp calls the norms of each architecture: its converter's names beside transformers'.

Names are data here, one row an architecture. llama.cpp adds the offset when it converts, in
`modify_tensors` of conversion/*.py, so a GGUF file holds gamma wherever a family is zero-centred.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gemma_fold.compare.files.gguf import Value

_BLOCK = re.compile(r"blk\.(\d{1,5})\.(.+)")

_PRE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_SANDWICH = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QK = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_QWEN = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ssm_norm": "linear_attn.norm",
    **_QK,
}
_QWEN_DRAFT = {
    "nextn.enorm": "pre_fc_norm_embedding",
    "nextn.hnorm": "pre_fc_norm_hidden",
    "nextn.shared_head_norm": "norm",
}
_STEP = {
    **_PRE,
    **_QK,
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.shared_head_norm": "shared_head.norm",
}
_PLAMO = {
    "attn_norm": "pre_mixer_norm",
    "post_attention_norm": "post_mixer_norm",
    "ffn_norm": "pre_mlp_norm",
    "post_ffw_norm": "post_mlp_norm",
}
_PLAMO3 = {**_PLAMO, "attn_q_norm": "mixer.q_norm", "attn_k_norm": "mixer.k_norm"}
_TOP = {"output_norm": "norm", "norm": "norm"}


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one architecture's norms are named.

    model_type: whose row of the rules says what they are. blocks: names within a layer. layers:
    where transformers keeps the layers. top: names outside of the layers. draft: names of the
    layers that follow the model's own, which transformers keeps apart under `mtp.`; none where it
    counts them on.
    """

    model_type: str
    blocks: Mapping[str, str]
    layers: str = "model.layers"
    top: Mapping[str, str] = field(default_factory=lambda: _TOP)
    draft: Mapping[str, str] = field(default_factory=dict)


#: `general.architecture` -> names. The plain families are here because 1 is added to them too.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "gemma": Architecture("gemma", _PRE),
        "gemma2": Architecture("gemma2", _SANDWICH),
        "gemma3": Architecture("gemma3_text", {**_SANDWICH, **_QK}),
        "gemma-embedding": Architecture("gemma3_text", {**_SANDWICH, **_QK}),
        "gemma3n": Architecture("gemma3n_text", {**_SANDWICH, **_QK}),
        "gemma4": Architecture("gemma4_text", {**_SANDWICH, **_QK}),
        "qwen3next": Architecture("qwen3_next", _QWEN, draft=_QWEN_DRAFT),
        "qwen35": Architecture("qwen3_5_text", _QWEN, draft=_QWEN_DRAFT),
        "qwen35moe": Architecture("qwen3_5_moe_text", _QWEN, draft=_QWEN_DRAFT),
        "nemotron": Architecture("nemotron", _PRE),
        "plamo2": Architecture("plamo2", _PLAMO, layers="model.layers.layers"),
        "plamo3": Architecture("plamo3", _PLAMO3, layers="model.layers.layers"),
        "step35": Architecture("step3p5", _STEP),
        "muse-glimmer": Architecture("muse_glimmer_text", _SANDWICH),
        "llama": Architecture("llama", _PRE),
        "qwen2": Architecture("qwen2", _PRE),
        "qwen3": Architecture("qwen3", {**_PRE, **_QK}),
        "qwen3moe": Architecture("qwen3_moe", {**_PRE, **_QK}),
        "clip": Architecture(
            "gemma3", {}, top={"mm.soft_emb_norm": "multi_modal_projector.mm_soft_emb_norm"}
        ),
    }
)


def config_of(architecture: Architecture, name: str, values: Mapping[str, Value]) -> dict[str, Any]:
    """As much of a config.json as the header of a GGUF file tells."""
    own, draft = _layers(name, values)
    config: dict[str, Any] = {"model_type": architecture.model_type}
    if own:
        config |= {"num_hidden_layers": own, "num_nextn_predict_layers": draft}
    return config


def transformers_name(
    stored: str, architecture: Architecture, name: str, values: Mapping[str, Value]
) -> str | None:
    """What transformers calls the norm `stored`; None for what is no norm of the architecture."""
    stem = stored.removesuffix(".weight")
    if stem == stored:
        return None
    found = _BLOCK.fullmatch(stem)
    if found is None:
        top = architecture.top.get(stem)
        if top is None:
            return None
        return top + ".weight" if "." in top else f"model.{top}.weight"
    layer, short = int(found[1]), found[2]
    own, _ = _layers(name, values)
    if architecture.draft and own and layer >= own:
        if short in architecture.draft:
            return f"mtp.{architecture.draft[short]}.weight"
        root, layer = "mtp.layers", layer - own
    else:
        root = architecture.layers
    return (
        f"{root}.{layer}.{architecture.blocks[short]}.weight"
        if short in architecture.blocks
        else None
    )


def _layers(name: str, values: Mapping[str, Value]) -> tuple[int, int]:
    """The model's own layers, 0 where it does not say, and the draft layers that follow them."""
    count = values.get(f"{name}.block_count", 0)
    draft = values.get(f"{name}.nextn_predict_layers", 0)
    if (
        not isinstance(count, int)
        or not isinstance(draft, int)
        or not 0 <= draft <= count <= 10_000
    ):
        return 0, 0
    return count - draft, draft
