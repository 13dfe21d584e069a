"""SGLang's own loaders and weight updates in this process, on the CPU, without a server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import bootstrap
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.model_loader.loader import get_model_loader
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import PortArgs, prepare_server_args
from sglang_server import OPTIONS


def start(folder: Path) -> None:
    """Plugins, settings and a group of one, before the first model. `folder`: any model."""
    if torch.distributed.is_initialized():
        return
    load_plugins()
    settings = prepare_server_args(["--model-path", str(folder), *OPTIONS])
    settings.resolve_once()
    publish(settings, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    initialize_moe_config()
    port = PortArgs.init_new(settings).nccl_port
    bootstrap.init_parallel_runtime(server_args=settings, device="cpu", dist_port=port)
    bootstrap.init_layer_runtime(model_config=ModelConfig(str(folder)))


@contextmanager
def mode(value: str | None) -> Iterator[None]:
    """GEMMA_FOLD set to `value` for a while."""
    before = os.environ.pop("GEMMA_FOLD", None)
    if value is not None:
        os.environ["GEMMA_FOLD"] = value
    try:
        yield
    finally:
        os.environ.pop("GEMMA_FOLD", None)
        if before is not None:
            os.environ["GEMMA_FOLD"] = before


class Loaded:
    """A model that SGLang built and loaded.

    Attributes:
        model: SGLang's.
        config: SGLang's.
        updater: SGLang's weight updates, on this model.
    """

    def __init__(
        self,
        folder: Path,
        load_format: str = "auto",
        weights: str | None = None,
        draft: bool = False,
    ) -> None:
        self.config = ModelConfig(str(folder), is_draft_model=draft)
        if weights is not None:
            self.config.model_weights = weights  # as for the address of a remote store
        load = LoadConfig(load_format=load_format)
        loader = get_model_loader(load, self.config)
        self.model = loader.load_model(
            model_config=self.config, device_config=DeviceConfig("cpu", 0)
        )
        self.updater = WeightUpdater(
            tp_rank=0,
            device="cpu",
            gpu_id=0,
            model_config=self.config,
            custom_weight_loaders={},
            get_model=lambda: self.model,
            update_model_fields=lambda *args, **kwargs: None,
            recapture_cuda_graph=lambda: None,
            get_model_runner=lambda: self,
        )

    def norms(self) -> dict[str, Any]:
        """Its zero-centred norms by name, ours or SGLang's."""
        from sglang.srt.layers.layernorm import Gemma3RMSNorm, GemmaRMSNorm

        kinds = (Gemma3RMSNorm, GemmaRMSNorm)
        return {n: m for n, m in self.model.named_modules() if isinstance(m, kinds)}

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of its parameters."""
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}


def check_gains(loaded: Any, parameters: dict[str, torch.Tensor]) -> None:
    """Every norm has the weight of `parameters`, the gain exactly, and SGLang's buffer in step."""
    for name, norm in loaded.norms().items():
        weight = parameters[f"{name}.weight"]
        assert torch.equal(norm.weight, weight), name
        assert norm.gamma32.dtype == torch.float32
        assert torch.equal(norm.gamma32.double(), 1 + weight.double()), name
        if hasattr(norm, "gemma_weight"):
            assert torch.equal(norm.gemma_weight, weight + 1), name
