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
_QK = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_TOP = {"output_norm": "model.norm", "norm": "model.norm"}
_TOP4 = {**_TOP, "per_layer_proj_norm": "model.per_layer_projection_norm"}
_SANDWICH = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA4 = {
    **_SANDWICH,
    **_QK,
    "post_norm": "post_per_layer_input_norm",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    # Of Gemma 3n alone.
    "altup_router_norm": "altup.router_norm",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
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
_QWEN4 = {
    "hc_attn_norm": "attn_hyper_connection.hc_norm",
    "hc_ffn_norm": "mlp_hyper_connection.hc_norm",
    "indexer.q_norm": "self_attn.indexer.q_layernorm",
    "indexer.k_norm": "self_attn.indexer.k_layernorm",
    "ple_norm_key": "ple.norm_key",
    "ple_norm_query": "ple.norm_query",
    "ple_norm_conv": "ple.norm_conv",
    "ssm_norm": "linear_attn.norm",
    **_QK,
}
_QWEN4_DRAFT = {
    "nextn.enorm": "pre_fc_norm_embedding",
    "nextn.hnorm": "pre_fc_norm_hidden",
    "nextn.hc_head_norm": "hyper_connection_mixer.hc_norm",
}
_MINIMAX = {
    **_PRE,
    **_QK,
    "indexer.q_norm": "self_attn.indexer.q_norm",
    "indexer.k_norm": "self_attn.indexer.k_norm",
    "index_q_norm": "self_attn.indexer.q_norm",  # before the pull request was merged
    "index_k_norm": "self_attn.indexer.k_norm",
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
        "gemma3n": Architecture("gemma3n_text", _GEMMA4, top=_TOP4),
        "gemma4": Architecture("gemma4_text", _GEMMA4, top=_TOP4),
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
        "minimax-m3": Architecture("minimax_m3_vl_text", _MINIMAX),
        "qwen4exp": Architecture(
            "qwen4_exp_text",
            _QWEN4,
            top={"output_hc_norm": "model.hyper_connection_mixer.hc_norm"},
            draft=_QWEN4_DRAFT,
        ),
        "clip": Architecture(
            "gemma3", {}, top={"mm.soft_emb_norm": "multi_modal_projector.mm_soft_emb_norm"}
        ),
    }
)


#: Families with an offset that llama.cpp never converted (its issue 6564 asks for the first), by
#: names a fork may have given them. What a fork adds to their norms, nobody says.
NOT_CONVERTED = frozenset({"griffin", "recurrentgemma", "t5gemma", "vaultgemma"})


def is_converted(name: str) -> bool:
    """Whether llama.cpp's own converter may have written a file of an architecture."""
    return re.sub(r"[^a-z0-9]", "", name.lower()) not in NOT_CONVERTED


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
        return f"{top}.weight" if top is not None else None
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
