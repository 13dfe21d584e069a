"""Gemma 2 and 3 with their sandwich norms fused.

These layers norm the output of a block, add it to the residual stream and norm the sum: two norms
and an add that :func:`gemma_fold.ops.rms_norm_add_rms_norm` makes one operator, and with tensor
parallelism the all-reduce of the block's output before them. The layers' code stays: a pair of norm
modules is linked, the first hands its input through, and the second does the work of both.

That is right only where nothing reads what is handed through, so a layer or model is only touched
where its forward is, statement for statement, one that was read.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from gemma_fold import ops
from gemma_fold.runtime.sglang.native import NativeNorm, all_reduce_workspace, rms_norm, takes
from gemma_fold.runtime.sglang.norms import derive

#: sha256 of the statements of known forwards, layout and comments aside, by class.
_KNOWN = {
    "Gemma2DecoderLayer": frozenset({"0"}),
    "Gemma3DecoderLayer": frozenset({"0"}),
    "Gemma2Model": frozenset({"0"}),
    "Gemma3TextModel": frozenset({"0"}),
}
_MODELS = {"Gemma2Model": "Gemma2DecoderLayer", "Gemma3TextModel": "Gemma3DecoderLayer"}


class Link:
    """Two norms with nothing but a residual add between them.

    Attributes:
        captured: layers whose input the model keeps for a draft model, which must be the normed
            one: while there are any, each norm works for itself. SGLang sets it after loading.
        workspace: name of the all-reduce workspace if the first norm's input is one rank's part
            of a sum, else None.
    """

    def __init__(self, model: nn.Module, workspace: str | None) -> None:
        self._model = (model,)  # in a tuple, so that no module registers it as a child
        self.workspace = workspace

    @property
    def open(self) -> bool:
        """Whether the first norm hands through."""
        return not getattr(self._model[0], "layers_to_capture", None)


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
        if not link.open or not takes(x, residual):
            return super().forward(x, residual, post_residual_addition)
        if residual is None:  # SGLang's split prefill drops it
            return super().forward(rms_norm(post.completed(x), post.gamma32, post.epsilon))
        if post_residual_addition is not None:
            residual = residual + post_residual_addition
        gains = (post.gamma32, self.gamma32)
        if link.workspace is None:
            return ops.rms_norm_add_rms_norm(x, residual, *gains, post.epsilon, self.epsilon)
        return ops.all_reduce_rms_norm_add_rms_norm(
            x, residual, *gains, link.workspace, post.epsilon, self.epsilon
        )


def pair_norms(model: nn.Module) -> int:
    """Link the sandwich norms of every known Gemma 2 or 3 in `model`; returns the pairs."""
    pairs = 0
    for module in list(model.modules()):
        layer_class = _MODELS.get(type(module).__name__)
        if layer_class is not None and _is_known(module):
            pairs += _pair(module, layer_class)
    return pairs


def _pair(model: nn.Module, layer_class: str) -> int:
    layers: list[Any] = list(model.layers)  # type: ignore[arg-type]
    if not layers or not all(type(x).__name__ == layer_class and _is_known(x) for x in layers):
        return 0
    norms = [(layer.post_attention_layernorm, layer.pre_feedforward_layernorm) for layer in layers]
    norms += [(a.post_feedforward_layernorm, b.input_layernorm) for a, b in pairwise(layers)]
    norms.append((layers[-1].post_feedforward_layernorm, model.norm))
    if not all(type(norm).__mro__[1] is NativeNorm for pair in norms for norm in pair):
        return 0
    link = Link(model, _defer_all_reduce(layers))
    for post, pre in norms:
        post.__class__ = derive(PostNorm, type(post).__mro__[2])
        pre.__class__ = derive(PreNorm, type(pre).__mro__[2])
        post.link = link
        pre.__dict__["post"] = (post,)
    return len(norms)


def _defer_all_reduce(layers: list[Any]) -> str | None:
    """Leave the sums of the layers' last projections to the norms; None where there are none."""
    projections = [x for layer in layers for x in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    if not all(x.tp_size > 1 and x.reduce_results for x in projections):
        return None
    weight = layers[0].input_layernorm.weight
    workspace = all_reduce_workspace(weight.shape[0], weight.dtype, weight.device)
    if workspace is not None:
        for projection in projections:
            projection.reduce_results = False
    return workspace


def _is_known(module: nn.Module) -> bool:
    cls = type(module)
    known = _KNOWN[cls.__name__]
    return cls.__module__.startswith("sglang.srt.models.gemma") and (
        statements_digest(cls.__dict__.get("forward")) in known
    )


@cache
def statements_digest(forward: Callable[..., Any] | None) -> str:
    """sha256 of the statements of a function, layout and comments aside."""
    try:
        source = textwrap.dedent(inspect.getsource(forward))  # type: ignore[arg-type]
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    if not isinstance(function, ast.FunctionDef):
        return ""
    statements = ast.unparse(ast.Module(function.body, []))
    return hashlib.sha256(statements.encode()).hexdigest()
