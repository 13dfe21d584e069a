"""What the tests ask of a model where it lives: vLLM sends these functions there, by name."""

from __future__ import annotations

from typing import Any

import torch


def native_norms(model: Any) -> int:
    """How many norms hold gamma."""
    return sum(hasattr(module, "gamma") for module in model.modules())


def reducing_norms(model: Any) -> int:
    """How many norms do the all-reduce before them."""
    return sum(bool(getattr(module, "workspace", None)) for module in model.modules())


def first_norm(model: Any) -> torch.Tensor:
    """The gain of the first norm, fp32 [H], whatever the module holds."""
    weight = model.model.layers[0].input_layernorm.weight.detach()
    return weight.view(-1).clone() if weight.dim() == 2 else weight.float() + 1.0


def norm_weights(model: Any) -> dict[str, torch.Tensor]:
    """The parameters of every norm."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "norm" in n}


def draft_norms(worker: Any) -> dict[str, list[float]]:
    """The norm weights of the draft model."""
    return {
        name: parameter.detach().float().flatten().tolist()
        for name, parameter in worker.model_runner.drafter.model.named_parameters()
        if "norm" in name
    }
