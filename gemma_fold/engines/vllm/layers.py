"""Native mode: give a decoder's norms fp32 gamma and gemma-fold's operators.

No forward is copied or replaced. In vLLM a Gemma 2/3 layer calls

    post_attention_layernorm(x), then pre_feedforward_layernorm(x, residual), then mlp,
    then post_feedforward_layernorm(x); the next layer calls input_layernorm(x, residual)

so the norm after a block passes its input on, and the next norm does both with the residual add
between. With tensor parallelism the projection that ends the block leaves out its all-reduce, which
the same operator does. Decoders with one norm a block fuse the all-reduce, the add and the norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import vllm
from torch import nn
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import RowParallelLinear

from gemma_fold.engines.attach.handed import methods_of
from gemma_fold.engines.known_code import VLLM, Family
from gemma_fold.engines.mode import refuse_if_required
from gemma_fold.engines.vllm.linear import stream, unstreamed
from gemma_fold.engines.vllm.norms import (
    NativeNorm,
    PassedNorm,
    SandwichNorm,
    adopt,
    adopt_qk_norms,
)
from gemma_fold.engines.vllm.weights import Tally, gamma_loader
from gemma_fold.ops import checks

logger = init_logger("vllm.gemma_fold")

_BY_MODEL = {(f"vllm.model_executor.models.{one.module}", one.model): one for one in VLLM}
#: Speculative decoding that reads nothing but the last hidden states.
_PLAIN_SPECULATION = (None, "mtp", "ngram", "ngram_gpu", "suffix", "draft_model")


@dataclass(frozen=True, slots=True)
class Native:
    """What native mode needs to know beside the model.

    Attributes:
        workspace: name of the all-reduce workspace, or None if vLLM reduces.
    """

    vllm_config: Any
    workspace: str | None
    tally: Tally


def make_native(model: nn.Module, native: Native) -> int:
    """Turn the decoders of `model` native, in place; returns how many norms are.

    Norms of anything else keep vLLM's own code, with w = gamma - 1.

    Raises:
        UnsupportedModelError: a decoder cannot be, and GEMMA_FOLD=require asks for it.
    """
    norms = 0
    for module in list(model.modules()):
        family = _BY_MODEL.get((type(module).__module__, type(module).__name__))
        if family is None or isinstance(getattr(module, "norm", None), NativeNorm):
            continue
        layers = list(_local_layers(module))
        problem = _problem(family, module, layers)
        if problem:
            refuse_if_required(problem)
            logger.warning_once("gemma-fold: %s; its norms run in stock mode", problem)
            continue
        norms += _Decoder(family, module, layers, native).run()
        if not unstreamed(native.vllm_config):
            adapters = native.vllm_config.lora_config is not None
            streamed, count = stream(layers, adapters=adapters)
            native.tally.streamed += streamed
            native.tally.linear += count
    return norms


def _local_layers(model: Any) -> Iterator[nn.Module]:
    """The layers of this pipeline stage."""
    for index in range(model.start_layer, model.end_layer):
        yield model.layers[index]


def _problem(family: Family, model: Any, layers: list[Any]) -> str:
    """Why a decoder cannot be native; empty if it can."""
    if not layers:
        return f"{family.model} has no layer on this stage"
    if any(type(layer).__name__ != family.layer for layer in layers):
        return f"vLLM {vllm.__version__}: its layers are not {family.layer}"
    problem = family.model_problem(methods_of(type(model)), model)
    for layer in layers:
        problem = problem or family.layer_problem(methods_of(type(layer)), layer)
    if problem:
        return f"vLLM {vllm.__version__}: {problem}"
    if model.config.hidden_size > checks.MAX_HIDDEN:
        return f"{family.model} is wider than {checks.MAX_HIDDEN}"
    for layer in layers:
        for name in _norm_names(family):
            if type(getattr(layer, name, None)) is not GemmaRMSNorm:
                return f"{family.layer} has a {name} that is not a GemmaRMSNorm"
    return ""


def _norm_names(family: Family) -> tuple[str, ...]:
    names = ("input_layernorm", "post_attention_layernorm")
    if family.layout == "sandwich":
        return (*names, "pre_feedforward_layernorm", "post_feedforward_layernorm")
    return names


class _Decoder:
    """One decoder being turned native."""

    def __init__(self, family: Family, model: Any, layers: list[Any], native: Native) -> None:
        self._family = family
        self._model = model
        self._layers = layers
        self._native = native
        self._loader = gamma_loader(native.tally)
        self._workspace = native.workspace
        speculation = native.vllm_config.speculative_config
        if speculation is not None and speculation.method not in _PLAIN_SPECULATION:
            self._workspace = None  # it reads hidden states between the layers
        self._norms = 0

    def run(self) -> int:
        for layer in self._layers:
            if self._family.attention:
                norms, mode = adopt_qk_norms(
                    layer.self_attn,
                    self._native.vllm_config,
                    self._loader,
                    self._family.attention,
                )
                self._norms += norms
                if mode is not None:
                    self._native.tally.qk_modes.append(mode)
            self._inside(layer)
        self._adopt(self._layers[0].input_layernorm, NativeNorm)
        for layer, follower in pairwise(self._layers):
            self._between(layer, follower.input_layernorm)
        self._end()
        return self._norms

    def _inside(self, layer: Any) -> None:
        """From the attention to the feed-forward block."""
        if self._family.layout == "sandwich":
            self._sandwich(
                layer.post_attention_layernorm,
                layer.pre_feedforward_layernorm,
                layer.self_attn.o_proj,
            )
        else:
            self._add_norm(layer.post_attention_layernorm, layer, _mixer_projection(layer))

    def _between(self, layer: Any, following: nn.Module) -> None:
        """From the feed-forward block to the next layer, or to the last norm."""
        if self._family.layout == "sandwich":
            self._sandwich(layer.post_feedforward_layernorm, following, layer.mlp.down_proj)
        else:
            self._add_norm(following, layer, _feed_forward_projection(layer))

    def _end(self) -> None:
        """The last local layer. Between two pipeline stages vLLM sends what is reduced and normed,
        because it may send each rank's part of it alone."""
        last = self._layers[-1]
        if get_pp_group().is_last_rank:
            self._between(last, self._model.norm)
            return
        if self._family.layout == "sandwich":
            self._adopt(last.post_feedforward_layernorm, NativeNorm)
        if type(self._model.norm) is GemmaRMSNorm:  # built on every stage, run on the last
            self._adopt(self._model.norm, NativeNorm)

    def _sandwich(self, post: nn.Module, pre: nn.Module, projection: nn.Module) -> None:
        passed = self._adopt(post, PassedNorm)
        norm = self._adopt(pre, SandwichNorm)
        norm.post = (passed,)
        norm.workspace = self._take_over(projection)

    def _add_norm(self, module: nn.Module, layer: Any, projection: nn.Module | None) -> None:
        norm = self._adopt(module, NativeNorm)
        if not getattr(layer, "layer_scale", False):  # scaled before the norm, after the all-reduce
            norm.workspace = self._take_over(projection)

    def _adopt(self, module: nn.Module, cls: type[NativeNorm]) -> NativeNorm:
        self._norms += 1
        return adopt(module, cls, self._loader)

    def _take_over(self, projection: Any) -> str | None:
        """The workspace, if the norm after `projection` is to do its all-reduce."""
        if (
            self._workspace is None
            or type(projection) is not RowParallelLinear
            or not projection.reduce_results
            or projection.tp_size == 1
            or projection.bias is not None
        ):
            return None
        projection.reduce_results = False
        return self._workspace


def _mixer_projection(layer: Any) -> nn.Module | None:
    """The projection that ends attention of any kind."""
    if hasattr(layer, "self_attn"):
        return layer.self_attn.o_proj  # type: ignore[no-any-return]
    return layer.linear_attn.out_proj  # type: ignore[no-any-return]


def _feed_forward_projection(layer: Any) -> nn.Module | None:
    """The projection that ends a dense block. Mixtures of experts reduce in their own way."""
    if getattr(layer.mlp, "expert_gate", None) is not None:
        return None
    return getattr(layer.mlp, "down_proj", None)
