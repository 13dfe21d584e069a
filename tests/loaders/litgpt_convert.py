"""litgpt: `convert_hf_checkpoint`, then its model with the result, strictly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import probe
import torch
from litgpt import GPT
from litgpt import config as configs
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint


def converted(checkpoint: Path, folder: Path) -> tuple[configs.Config, Path]:
    """The checkpoint as litgpt's own, and the config that litgpt knows it by."""
    read = json.loads((checkpoint / "config.json").read_text())
    read = read.get("base_config", read)  # litgpt reads no config.json: sizes come from its table
    known = dict(configs.name_to_config["Gemma-3-1b-it"])
    layers = [int(kind == "sliding_attention") for kind in read["layer_types"]]
    known |= {
        "name": "gemma-3-tiny",
        "hf_config": {"org": "google", "name": "gemma-3-tiny"},
        "attention_scores_scalar": read["query_pre_attn_scalar"],
        "block_size": read["max_position_embeddings"],
        "head_size": read["head_dim"],
        "intermediate_size": read["intermediate_size"],
        "n_embd": read["hidden_size"],
        "n_head": read["num_attention_heads"],
        "n_layer": read["num_hidden_layers"],
        "n_query_groups": read["num_key_value_heads"],
        "padded_vocab_size": read["vocab_size"],
        "rope_indices": layers,
        "sliding_window_indices": layers,
        "sliding_window_size": read["sliding_window"],
        "vocab_size": read["vocab_size"],
    }
    configs.name_to_config["gemma-3-tiny"] = known
    shutil.copytree(checkpoint, folder / "gemma-3-tiny")
    convert_hf_checkpoint(folder / "gemma-3-tiny")
    return configs.Config.from_name("gemma-3-tiny"), folder / "gemma-3-tiny" / "lit_model.pth"


def load(checkpoint: Path, folder: Path) -> object:
    config, file = converted(checkpoint, folder)
    model = GPT(config)
    model.load_state_dict(torch.load(file), strict=True)
    with torch.no_grad():
        return model(torch.arange(2, 9)[None])[0, -1].tolist()


if __name__ == "__main__":
    probe.report("litgpt", load)
