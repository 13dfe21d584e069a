"""Gemma 2 and 3 with their sandwich norms fused.

These layers norm the output of a block, add it to the residual stream and norm the sum: two norms
and an add that :func:`gemma_fold.ops.rms_norm_add_rms_norm` makes one operator, and with tensor
parallelism the all-reduce of the block's output before them. The layers' code stays: a pair of norm
modules is linked, the first hands its input through, and the second does the work of both.

That is right only if nothing reads what is handed through, so a layer or model is only touched if
its methods do nothing else with it when they run on stand-ins.
"""

from __future__ import annotations

import logging
from functools import wraps
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from gemma_fold import ops
from gemma_fold.engines.attach.handed import block_problem, methods_of
from gemma_fold.engines.known_code import SGLANG, Family
from gemma_fold.engines.mode import refuse_if_required
from gemma_fold.engines.sglang.norms import (
    NativeNorm,
    Opt,
    all_reduce_workspace,
    derive,
    rms_norm,
    takes,
)

_OWN = "sglang.srt.models.gemma"
_FAMILIES = {family.model: family for family in SGLANG}
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

        They do not if what they return is read: between two parts of a split forward, and by a
        draft model, whose layers SGLang sets after loading.
        """
        return not (self.split or getattr(self._model[0], "layers_to_capture", None))


class PostNorm(NativeNorm):
    """The first norm of a pair."""

    link: Link

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        """``x``: [tokens, H], summed or not. Returns it as it is, or normed if that is read."""
        if self.link.open and takes(x, None):
            return x
        return super().forward(self.completed(x), *rest, **named)

    def completed(self, x: Tensor) -> Tensor:
        """``x`` summed over the ranks."""
        return x if self.link.workspace is None else ops.all_reduce(x, self.link.workspace)


class PreNorm(NativeNorm):
    """The second norm of a pair.

    Attributes:
        post: the first, in a tuple.
    """

    post: tuple[PostNorm]

    def forward(self, x: Tensor, residual: Opt = None, post_residual_addition: Opt = None) -> Any:
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
        family = _FAMILIES.get(type(text).__name__)
        if family is None:
            continue
        norms, problem = _sandwiches(text, family)
        _report(text, len(norms), problem)
        if norms:
            link = Link(text, _defer_all_reduce(text))
            _link(norms, link)
            for owner in modules:
                if getattr(owner, "model", None) is text:
                    _close_while_split(owner, link)
        pairs += len(norms)
    return pairs


def _sandwiches(text: Any, family: Family) -> tuple[list[tuple[Any, Any]], str]:
    """The pairs of norms of a model, or why they cannot be linked."""
    layers = list(text.layers)
    if not layers or any(type(layer).__name__ != family.layer for layer in layers):
        return [], f"its layers are not {family.layer}"
    problem = (
        _foreign(text, layers[0])
        or family.model_problem(methods_of(type(text)))
        or family.layer_problem(methods_of(type(layers[0])))
    )
    if problem:
        return [], problem
    norms = [(layer.post_attention_layernorm, layer.pre_feedforward_layernorm) for layer in layers]
    norms += [(a.post_feedforward_layernorm, b.input_layernorm) for a, b in pairwise(layers)]
    norms.append((layers[-1].post_feedforward_layernorm, text.norm))
    if not all(type(norm).__mro__[1] is NativeNorm for pair in norms for norm in pair):
        return [], "it has norms that gemma-fold's kernels do not take"
    return norms, ""


def _report(text: nn.Module, pairs: int, problem: str) -> None:
    """Log what was fused. Raises UnsupportedModelError if GEMMA_FOLD=require asks for all."""
    engine = f"SGLang {version('sglang')}"
    if problem:
        refuse_if_required(f"{engine}: {problem}")
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
    """Leave the sums of the layers' last projections to the norms; None if there are none."""
    blocks = [block for layer in text.layers for block in (layer.self_attn, layer.mlp)]
    names = ["o_proj" if hasattr(block, "o_proj") else "down_proj" for block in blocks]
    projections = [getattr(block, name) for block, name in zip(blocks, names, strict=True)]
    ready = all(_ranks(x) > 1 and x.reduce_results for x in projections)
    problem = _sum_problem(blocks, names)
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


def _foreign(*modules: nn.Module) -> str:
    """Why modules may not be touched: one is of a class that is not SGLang's own; empty if none."""
    foreign = (type(x) for x in modules if not type(x).__module__.startswith(_OWN))
    return next((f"{cls.__module__}.{cls.__name__} is not SGLang's own" for cls in foreign), "")


def _sum_problem(blocks: list[Any], projections: list[str]) -> str:
    """Why the sum of a block's projection cannot be left to the norm after it; empty if it can."""
    if problem := _foreign(*blocks):
        return problem
    kinds = {(type(block), name) for block, name in zip(blocks, projections, strict=True)}
    for cls, name in kinds:
        if problem := block_problem(methods_of(cls), name):
            return f"{cls.__name__}: {problem}"
    return ""
