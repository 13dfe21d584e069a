"""What is wrapped in vLLM, and a load from a model's construction to the check of its gammas."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

import vllm
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from gemma_fold._version import __version__
from gemma_fold.engines.checks import (
    check_version,
    folded_block,
    lock_problem,
    marked_config,
    wrap_innermost,
)
from gemma_fold.engines.mode import Mode, requested_mode
from gemma_fold.engines.vllm.weights import (
    Tally,
    name_gammas,
    stock_loader,
    zero_centred_norms,
)
from gemma_fold.engines.weights import folded_tensors
from gemma_fold.errors import CheckpointError, UnsupportedModelError
from gemma_fold.format.manifest import FoldedTensor
from gemma_fold.format.names import MODEL_TYPE

#: Load formats that read what an engine saved: its own parameters, past their weight loaders.
_NO_CHECKPOINT = ("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache")

logger = init_logger("vllm.gemma_fold")


def install() -> None:
    """Wrap vLLM's functions, once a process.

    Raises:
        HostError: this version of vLLM is not supported; nothing was wrapped.
    """
    version = str(vllm.__version__)
    record = getattr(loader_utils, "record_metadata_for_reloading", None)
    check_version("vLLM", version, record, ["model"])
    load = getattr(BaseModelLoader, "load_model", None)
    check_version("vLLM", version, load, ["self", "vllm_config", "model_config"])
    wrap_innermost(_original_config)
    loader_utils.record_metadata_for_reloading = _before(
        loader_utils.record_metadata_for_reloading, prepare_model
    )
    BaseModelLoader.load_model = wrap_load_model(BaseModelLoader.load_model)


def _before(original: Callable[..., None], first: Callable[..., None]) -> Callable[..., None]:
    def record_metadata_for_reloading(model: Any) -> None:
        first(model)
        original(model)

    return record_metadata_for_reloading


def _original_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    marked = marked_config(config, where)
    if problem := lock_problem(config[MODEL_TYPE], where, "vLLM"):
        raise CheckpointError(problem)
    return marked


# A load


@dataclass
class Loading:
    """The load in progress.

    Attributes:
        mode: of the model.
        workspace: name of what native norms reduce with; None if vLLM reduces.
        folded: vLLM's config of the model, if it is a folded checkpoint.
        tally: what the norms have taken so far.
    """

    vllm_config: Any
    mode: Mode
    workspace: str | None = None
    folded: Any = None
    tally: Tally = field(default_factory=Tally)

    @cached_property
    def tensors(self) -> Mapping[str, FoldedTensor]:
        """The folded tensors that the manifest lists. Only norms that hold w need them."""
        return {} if self.folded is None else _manifest(self.folded)


_current: list[Loading] = []


@contextmanager
def _loading(loading: Loading) -> Iterator[Loading]:
    _current.append(loading)
    try:
        yield loading
    finally:
        _current.pop()


def choose_mode(vllm_config: Any, model_config: Any, *, folded: bool) -> Mode:
    """The mode for a model about to be built.

    `GEMMA_FOLD` decides if it is set, for originals too. Otherwise a folded checkpoint is native
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
        workspace = _workspace(vllm_config, model_config) if mode == "native" else None
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
    """Of a folded checkpoint; nothing if vLLM reads weights from a store and no other file."""
    try:
        return folded_tensors(str(model_config.model), getattr(model_config, "revision", None))
    except (OSError, CheckpointError) as error:
        logger.warning_once(
            "gemma-fold: norms of an fp32 checkpoint would be rounded twice to 16 bits (%s)", error
        )
        return {}


def _workspace(vllm_config: Any, model_config: Any) -> str | None:
    """The all-reduce workspace for a model. Collective.

    Its name is the same in every run, because vLLM's cached graphs hold it.
    """
    from vllm.distributed import get_tp_group

    from gemma_fold.engines.workspace import shared_workspace

    group = get_tp_group()
    if group.world_size == 1 or vllm_config.parallel_config.enable_dbo:
        return None  # two batches at once would share the buffers
    return shared_workspace(
        f"gemma_fold.{group.unique_name}",
        group.device_group,
        hidden=model_config.get_hidden_size(),
        max_tokens=min(2048, vllm_config.scheduler_config.max_num_batched_tokens),
        dtype=model_config.dtype,
    )


def prepare_model(model: nn.Module) -> None:
    """Make the norms of a built `model` native if the mode is, and give the others their loaders.

    vLLM builds a language model inside a larger one with the same function, so a norm may come by
    twice.
    """
    loading = _current[-1] if _current else None
    if loading is not None and loading.mode == "native":
        _make_native(model, loading)
    tally = loading.tally if loading is not None else None
    stock = 0
    for _, _, weight, offset in zero_centred_norms(model):
        weight.weight_loader = stock_loader(offset, tally)  # type: ignore[attr-defined]
        stock += 1
    if loading is not None and tally is not None:
        tally.stock = stock  # the outermost model comes last
        if stock:
            name_gammas(model, loading.tensors)


def _make_native(model: nn.Module, loading: Loading) -> None:
    # Imported here: stock mode needs no operators.
    from gemma_fold.engines.vllm.layers import Native, make_native
    from gemma_fold.ops.collectives.workspace import find

    workspace = loading.workspace
    norms = make_native(model, Native(loading.vllm_config, workspace, loading.tally))
    loading.tally.native += norms
    if norms:
        logger.info_once(
            "gemma-fold: native mode, %d norms with fp32 gamma; %s%s; %s",
            norms,
            _explain_qk(loading.tally),
            "vLLM does the all-reduces" if workspace is None else find(workspace).explain(),
            _explain_linear(loading),
        )
        _separate_compile_cache(loading)


def _explain_qk(tally: Tally) -> str:
    """How the norms of q and k run; empty if none is native."""
    modes = sorted(set(tally.qk_modes))
    how = {"cached": "with the rotary embedding and the KV cache's write"}
    return "".join(
        f"those of q and k in {tally.qk_modes.count(mode)} layers {how.get(mode, mode)}; "
        for mode in modes
    )


def _explain_linear(loading: Loading) -> str:
    """Which linear layers stream their weight for a few tokens, and why others do not."""
    from gemma_fold.engines.vllm.linear import unstreamed

    if reason := unstreamed(loading.vllm_config):
        return f"linear layers as in vLLM ({reason})"
    tally = loading.tally
    text = f"{tally.streamed} of {tally.linear} linear layers stream their weight for few tokens"
    if tally.streamed == tally.linear:
        return text
    device = current_platform.get_device_name()
    return f"{text} (only bf16 weights of sizes that were measured to be faster on {device})"


def _separate_compile_cache(loading: Loading) -> None:
    """vLLM finds compiled graphs by its config, which must show that these are other graphs."""
    vllm_config = loading.vllm_config
    if isinstance(vllm_config.additional_config, dict):
        chosen = f"{loading.tally.qk_modes} {loading.tally.streamed}"
        vllm_config.additional_config["gemma_fold"] = f"{__version__} {chosen}"
    else:  # a platform's own object, whose hash does not cover this
        os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"


def _fold_dummies(model: Any) -> None:
    """Random weights go around the loaders, and are meant as raw ones."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and getattr(weight, "gemma_fold", False):
            weight.data.add_(1.0)


def _check(tally: Tally, block: Mapping[str, Any], model_config: Any) -> None:
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
