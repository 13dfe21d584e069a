"""Load a model in a mode, and check what its norms took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.platforms import current_platform

from gemma_fold.engines.mode import Mode, requested_mode
from gemma_fold.engines.originals import folded_tensors
from gemma_fold.engines.vllm.config import folded_block
from gemma_fold.engines.vllm.weights import Tally
from gemma_fold.errors import CheckpointError, UnsupportedModelError
from gemma_fold.format.manifest import FoldedTensor

logger = init_logger("vllm.gemma_fold")

#: Load formats that read what an engine saved: its own parameters, past their weight loaders.
_NO_CHECKPOINT = ("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache")


@dataclass
class Loading:
    """The load in progress: its mode, and what the norms have taken so far.

    workspace: what native norms reduce with, or None.
    folded: vLLM's config of the model, where it is a folded checkpoint.
    """

    vllm_config: Any
    mode: Mode
    workspace: str | None = None
    folded: Any = None
    tally: Tally = field(default_factory=Tally)

    @cached_property
    def tensors(self) -> Mapping[str, FoldedTensor]:
        """What the manifest says of each gamma. Only norms that hold w need it."""
        return {} if self.folded is None else _manifest(self.folded)


_current: list[Loading] = []


def current_loading() -> Loading | None:
    """The load in progress in this process, or None outside of one."""
    return _current[-1] if _current else None


@contextmanager
def _loading(loading: Loading) -> Iterator[Loading]:
    _current.append(loading)
    try:
        yield loading
    finally:
        _current.pop()


def choose_mode(vllm_config: Any, model_config: Any, *, folded: bool) -> Mode:
    """The mode for a model about to be built.

    `GEMMA_FOLD` decides where it is set, for originals too. Otherwise a folded checkpoint is native
    on CUDA and everything else is stock. Draft models are always stock.

    Raises:
        UsageError: the variable has another value.
    """
    wanted = requested_mode()
    if model_config is not vllm_config.model_config:
        return "stock"  # a draft
    return wanted or ("native" if folded and current_platform.is_cuda() else "stock")


def wrap_load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """`BaseModelLoader.load_model`, with the mode chosen before and the gammas checked after."""

    @wraps(original)
    def load_model(
        self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        block = folded_block(model_config.hf_config)
        mode = choose_mode(vllm_config, model_config, folded=block is not None)
        workspace = None
        if mode == "native":
            from gemma_fold.engines.vllm.workspace import tensor_parallel_workspace

            workspace = tensor_parallel_workspace(vllm_config, model_config)
        folded = None if block is None else model_config
        with _loading(Loading(vllm_config, mode, workspace, folded)) as loading:
            try:
                model = original(self, vllm_config, model_config, *args, **kwargs)
            except AssertionError as error:
                if block is None:
                    raise
                raise _not_zero_centred(model_config, error) from error
        if self.load_config.load_format == "dummy":
            _fold_dummies(model)
        elif block is not None and self.load_config.load_format not in _NO_CHECKPOINT:
            _check(loading.tally, block, model_config)
        if block is not None or mode == "native":
            logger.info(
                "gemma-fold: vLLM %s: %d norms folded, %d of them native",
                vllm.__version__,
                loading.tally.norms,
                loading.tally.native,
            )
        return model

    return load_model


def _manifest(model_config: Any) -> Mapping[str, FoldedTensor]:
    """Of a folded checkpoint; nothing where vLLM reads weights from a store and no other file."""
    try:
        return folded_tensors(str(model_config.model), getattr(model_config, "revision", None))
    except (OSError, CheckpointError) as error:
        logger.warning_once(
            "gemma-fold: norms of an fp32 checkpoint would be rounded twice to 16 bits (%s)", error
        )
        return {}


def _fold_dummies(model: Any) -> None:
    """Random weights go around the loaders, and are meant as raw ones."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and getattr(weight, "gemma_fold", False):
            weight.data.add_(1.0)


def _check(tally: Tally, block: dict[str, Any], model_config: Any) -> None:
    """CheckpointError unless every zero-centred norm took a gamma, of those that are listed."""
    where = model_config.model
    if tally.raw:
        raise CheckpointError(
            f"{tally.raw} of {tally.norms} norms in {where} are not folded, though its config says "
            "so; fold the original again with this version of gemma-fold"
        )
    if tally.gammas != tally.norms or tally.gammas > int(block["tensors"]):
        raise CheckpointError(
            f"the model has {tally.norms} zero-centred norms, but {where} gave {tally.gammas} "
            f"gammas and lists {block['tensors']}; fold the original again"
        )


def _not_zero_centred(model_config: Any, error: AssertionError) -> UnsupportedModelError:
    text = " ".join(str(error).split())
    return UnsupportedModelError(
        f"vLLM {vllm.__version__} does not load the folded {model_config.architectures[0]} in "
        f"{model_config.model} ({text}); serve the original, or another version of vLLM"
    )
