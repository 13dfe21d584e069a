"""Gemma 2 and 3 with their sandwich norms fused.

These layers norm the output of a block, add it to the residual stream and norm the sum: two norms
and an add that :func:`gemma_fold.ops.rms_norm_add_rms_norm` makes one operator, and with tensor
parallelism the all-reduce of the block's output before them. The layers' code stays: a pair of norm
modules is linked, the first hands its input through, and the second does the work of both.

That is right only where nothing reads what is handed through, so a layer or model is only touched
where its methods are, statement for statement, those that were read, or where they do nothing else
with it when they run on stand-ins.
"""

from __future__ import annotations

import logging
from functools import cache, wraps
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from gemma_fold import ops
from gemma_fold.engines.attach.handed import (
    Methods,
    block_problem,
    layer_problem,
    methods_of,
    model_problem,
)
from gemma_fold.engines.known_code import statements_digest
from gemma_fold.engines.mode import VARIABLE, required
from gemma_fold.engines.sglang.native import NativeNorm, all_reduce_workspace, rms_norm, takes
from gemma_fold.engines.sglang.norms import derive
from gemma_fold.errors import UnsupportedModelError

_MODELS = {"Gemma2Model": "Gemma2DecoderLayer", "Gemma3TextModel": "Gemma3DecoderLayer"}
#: Every method of these classes by the sha256 of its statements, in SGLang 0.5.17 to 0.5.21.
_KNOWN = {
    "Gemma2Model": {"forward": "53e3d06d41215d96a64ae2e58d466b404e66459afffbc48993086116924d3021"},
    "Gemma2DecoderLayer": {
        "forward": "b485fed61c7e10051cec19048240101f4d29cd608873de6da5a706c57be7abff"
    },
    "Gemma2Attention": {
        "forward": "18eda2bfd0435a3489e7c6922d7ddb075edc621ea12a45b58bc9efbec87e56b2"
    },
    "Gemma2MLP": {"forward": "83cf913241cbd00c8d9884472a7728fb0f126bcfaf0786c3e1d471fc79326de0"},
    "Gemma3TextModel": {
        "forward": "87bbab9f01558b2005609eff017153bea7cbb841feef71eb51f64c13fc57bd7f"
    },
    "Gemma3DecoderLayer": {
        "forward": "6159830b30d734330700a911f13a8055c0786b76f8417dadaf8231cddc2a8f62"
    },
    "Gemma3Attention": {
        "forward": "7ff418f9368ecd62c2c5924d14eede9713dd7e326645e4d2c6dd87b68562d805",
        "forward_native": "3e26553febdee5e0c880946266c7052c8db6a15ef96647dab3fc0ad288ac11c1",
        "forward_cpu": "1d372760112481a365118d67fc023e148e4a8f325d27630603dec69e94dda268",
    },
    "Gemma3MLP": {"forward": "83cf913241cbd00c8d9884472a7728fb0f126bcfaf0786c3e1d471fc79326de0"},
}


_log = logging.getLogger("sglang.gemma_fold")


class Link:
    """What the pairs of a model have in common.

    Attributes:
        workspace: name of the all-reduce workspace if the first norms' inputs are one rank's part
            of a sum, else None.
        split: whether the model is running a few layers at a time.
    """

    def __init__(self, model: nn.Module, workspace: str | None) -> None:
        self._model = (model,)  # in a tuple, so that no module registers it as a child
        self.workspace = workspace
        self.split = False

    @property
    def open(self) -> bool:
        """Whether the first norms hand through.

        They do not where what they return is read: between two parts of a split forward, and by a
        draft model, whose layers SGLang sets after loading.
        """
        return not (self.split or getattr(self._model[0], "layers_to_capture", None))


class PostNorm(NativeNorm):
    """The first norm of a pair."""

    link: Link

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
    ) -> Any:
        """``x``: [tokens, H], summed or not. Returns it as it is, or normed where that is read."""
        if self.link.open and takes(x, None):
            return x
        return super().forward(self.completed(x), residual, post_residual_addition)

    def completed(self, x: Tensor) -> Tensor:
        """``x`` summed over the ranks."""
        return x if self.link.workspace is None else ops.all_reduce(x, self.link.workspace)


class PreNorm(NativeNorm):
    """The second norm of a pair.

    Attributes:
        post: the first, in a tuple.
    """

    post: tuple[PostNorm]

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
    ) -> Any:
        """``x``: what the first norm returned; ``residual``: [tokens, H]."""
        (post,) = self.post
        link = post.link
        if not link.open or not takes(x, None):
            return super().forward(x, residual, post_residual_addition)
        if residual is None or not takes(x, residual):
            normed = rms_norm(post.completed(x), post.gamma32, post.epsilon)
            return super().forward(normed, residual, post_residual_addition)
        if post_residual_addition is not None:
            residual = residual + post_residual_addition
        gains = (post.gamma32, self.gamma32)
        if link.workspace is None:
            return ops.rms_norm_add_rms_norm(x, residual, *gains, post.epsilon, self.epsilon)
        return ops.all_reduce_rms_norm_add_rms_norm(
            x, residual, *gains, link.workspace, post.epsilon, self.epsilon
        )


def pair_norms(model: nn.Module) -> int:
    """Link the sandwich norms of every known Gemma 2 or 3 in `model`; returns the pairs.

    Collective with tensor parallelism: every rank builds the same models in the same order.
    """
    modules = list(model.modules())
    pairs = 0
    for text in modules:
        layer_class = _MODELS.get(type(text).__name__)
        if layer_class is None:
            continue
        norms, problem = _sandwiches(text, layer_class)
        _say(text, len(norms), problem)
        if norms:
            link = Link(text, _defer_all_reduce(text))
            _link(norms, link)
            for owner in modules:
                if getattr(owner, "model", None) is text:
                    _close_while_split(owner, link)
        pairs += len(norms)
    return pairs


def _sandwiches(text: Any, layer_class: str) -> tuple[list[tuple[Any, Any]], str]:
    """The pairs of norms of a model, or why they cannot be linked."""
    layers = list(text.layers)
    if not layers or any(type(layer).__name__ != layer_class for layer in layers):
        return [], f"its layers are no {layer_class}"
    problem = _first_problem(text, layers[0])
    if problem:
        return [], problem
    norms = [(layer.post_attention_layernorm, layer.pre_feedforward_layernorm) for layer in layers]
    norms += [(a.post_feedforward_layernorm, b.input_layernorm) for a, b in pairwise(layers)]
    norms.append((layers[-1].post_feedforward_layernorm, text.norm))
    if not all(type(norm).__mro__[1] is NativeNorm for pair in norms for norm in pair):
        return [], "it has norms that gemma-fold's kernels do not take"
    return norms, ""


def _say(text: nn.Module, pairs: int, problem: str) -> None:
    """What was fused, once. Raises UnsupportedModelError where GEMMA_FOLD=require asks for all."""
    engine = f"SGLang {version('sglang')}"
    if problem and required():
        raise UnsupportedModelError(
            f"{VARIABLE}=require, but {engine}: {problem}; upgrade gemma-fold, or unset {VARIABLE}"
        )
    if problem:
        _log.warning("gemma-fold: %s: no sandwich fused: %s", engine, problem)
    else:
        name = type(text).__name__
        _log.info("gemma-fold: %s: %d of %d sandwiches of %s fused", engine, pairs, pairs, name)


def _link(norms: list[tuple[Any, Any]], link: Link) -> None:
    for post, pre in norms:
        post.__class__ = derive(PostNorm, type(post).__bases__[1])
        pre.__class__ = derive(PreNorm, type(pre).__bases__[1])
        post.link = link
        pre.__dict__["post"] = (post,)


def _defer_all_reduce(text: Any) -> str | None:
    """Leave the sums of the layers' last projections to the norms; None where there are none."""
    blocks = [block for layer in text.layers for block in (layer.self_attn, layer.mlp)]
    projections = [
        block.o_proj if hasattr(block, "o_proj") else block.down_proj for block in blocks
    ]
    ready = all(_ranks(x) > 1 and x.reduce_results for x in projections)
    problem = _first_problem(*blocks)
    if ready and problem:
        _log.warning("gemma-fold: all-reduces stay SGLang's: %s", problem)
    if not ready or problem:
        return None
    norm = text.norm
    hidden, dtype = norm.weight.shape[0], norm.weight.dtype
    workspace = all_reduce_workspace(hidden, dtype, norm.gamma32.device)
    if workspace is not None:
        for projection in projections:
            projection.reduce_results = False
    return workspace


def _ranks(projection: Any) -> int:
    """Ranks that a projection sums over; since 0.5.23 it keeps their group alone."""
    group = getattr(projection, "tp_group", None)
    return int(getattr(projection, "tp_size", 0) or getattr(group, "world_size", 1))


def _close_while_split(owner: Any, link: Link) -> None:
    """SGLang's split prefill keeps what a layer returns, so that must be what it always was."""
    forward = getattr(owner, "forward_split_prefill", None)
    if forward is None:
        return

    @wraps(forward)
    def forward_closed(*args: Any, **kwargs: Any) -> Any:
        link.split = True
        try:
            return forward(*args, **kwargs)
        finally:
            link.split = False

    owner.__dict__["forward_split_prefill"] = forward_closed


def _first_problem(*modules: Any) -> str:
    classes: list[Any] = [type(module) for module in modules]
    return next((problem for cls in classes if (problem := _problem(cls))), "")


@cache
def _problem(cls: Any) -> str:
    """Why a class may not be touched; empty where it may."""
    known = _KNOWN.get(cls.__name__)
    if known is None or not cls.__module__.startswith("sglang.srt.models.gemma"):
        return f"{cls.__name__} is no class that gemma-fold knows"
    if all(statements_digest(cls.__dict__.get(name)) == digest for name, digest in known.items()):
        return ""
    problem = problem_of(cls.__name__, methods_of(cls))
    return f"{cls.__name__}: {problem}" if problem else ""


def problem_of(name: str, methods: Methods) -> str:
    """What a class of that name does beside passing on what is handed through; empty if nothing."""
    if name.endswith("DecoderLayer"):
        return layer_problem(methods, "sandwich")
    if name.endswith("Attention"):
        return block_problem(methods, "o_proj")
    if name.endswith("MLP"):
        return block_problem(methods, "down_proj")
    return model_problem(methods)
