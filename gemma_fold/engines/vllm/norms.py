"""Norm modules of native mode: fp32 gamma, and gemma-fold's operators.

A zero-centred norm becomes one of these in place, by its class and its parameter. The parameter is
fp32 [H, 1], as on disk, so that nothing can copy a raw w into it: vLLM's updates in kernel format
copy without asking a loader, and fail on the shape.

If vLLM's layer calls two norms in a row, the first one passes its input on, and the second one does
the work of both, together with the all-reduce before them if that was left to it.

The norms of q and k have four modes:

* fused: one launch norms every q and k head in place, right after their projection. The best if
  each kernel is launched by itself.
* inline: an expression, which a compiler fuses with the rotary embedding that follows, and whose
  sum it orders as it likes: not for `VLLM_BATCH_INVARIANT`.
* separate: one operator for q and one for k, if an adapter may replace the projection.
* cached: with the rotary embedding and the write of the KV cache, as `cached.py` says. The default
  where the layer allows it; where it does not, the log says why.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.config import CompilationMode
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from gemma_fold import ops
from gemma_fold.engines.known_code import statements_digest
from gemma_fold.engines.mode import requested
from gemma_fold.engines.vllm.weights import Loader
from gemma_fold.engines.weights import fold

logger = init_logger("vllm.gemma_fold")

Normed = Tensor | tuple[Tensor, Tensor]


class NativeNorm(GemmaRMSNorm):  # type: ignore[misc]
    """A norm by itself, or after the residual add: ``x``, ``residual``: [tokens, H].

    Attributes:
        weight: gamma, fp32 [H, 1].
        workspace: name of the all-reduce workspace if ``x`` is not summed over the ranks yet.
    """

    weight: nn.Parameter
    variance_epsilon: float
    workspace: str | None

    @property
    def gamma(self) -> Tensor:
        """fp32 [H]."""
        return self.weight.view(-1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Normed:
        if residual is None:
            return ops.rms_norm(x, self.gamma, self.variance_epsilon)
        if self.workspace is None:
            return ops.add_rms_norm(x, residual, self.gamma, self.variance_epsilon)
        return ops.all_reduce_add_rms_norm(
            x, residual, self.gamma, self.workspace, self.variance_epsilon
        )


class PassedNorm(NativeNorm):
    """A norm that is done elsewhere, with this module's gamma."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Normed:
        assert residual is None
        return x


class SandwichNorm(NativeNorm):
    """The norm after a block, the residual add and this norm, as one operator.

    Attributes:
        post: the norm after the block, in a tuple so that it is not a submodule.
    """

    post: tuple[PassedNorm]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Normed:
        if residual is None:  # the first layer: there was no block before
            return ops.rms_norm(x, self.gamma, self.variance_epsilon)
        post = self.post[0]
        gammas, epsilons = (post.gamma, self.gamma), (post.variance_epsilon, self.variance_epsilon)
        if self.workspace is None:
            return ops.rms_norm_add_rms_norm(x, residual, *gammas, *epsilons)
        return ops.all_reduce_rms_norm_add_rms_norm(x, residual, *gammas, self.workspace, *epsilons)


class InlineNorm(NativeNorm):
    """A norm as an expression, for a compiler to fuse with what surrounds it."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Normed:
        assert residual is None
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (x32 * scale * self.gamma).to(x.dtype)


def adopt(module: nn.Module, cls: type[NativeNorm], loader: Loader) -> NativeNorm:
    """Turn the zero-centred norm `module` into a `cls` in place, folding what it holds."""
    old = module._parameters["weight"]
    assert old is not None
    gamma = nn.Parameter(fold(old.data, 1.0)[:, None], requires_grad=False)
    gamma.weight_loader = loader  # type: ignore[attr-defined]
    gamma.gemma_fold = True  # type: ignore[attr-defined]
    module._parameters["weight"] = gamma
    module.__class__ = cls
    assert isinstance(module, NativeNorm)
    module.workspace = None
    return module


QkMode = Literal["fused", "inline", "separate", "cached"]

VARIABLE = "GEMMA_FOLD_QK"
_CLASSES: dict[QkMode, type[NativeNorm]] = {
    "fused": PassedNorm,
    "inline": InlineNorm,
    "separate": NativeNorm,
    "cached": PassedNorm,
}


def wanted_qk_mode() -> QkMode | None:
    """How q and k are to be normed; None if nobody said.

    Raises:
        UsageError: `GEMMA_FOLD_QK` has another value.
    """
    wanted = requested(VARIABLE, _CLASSES)
    return next((mode for mode in _CLASSES if wanted == mode), None)


def _uncached_qk_mode(vllm_config: Any) -> QkMode:
    compiled = vllm_config.compilation_config.mode != CompilationMode.NONE
    if compiled and not envs.VLLM_BATCH_INVARIANT:
        return "inline"
    return "separate" if vllm_config.lora_config is not None else "fused"


def adopt_qk_norms(
    attention: Any, vllm_config: Any, loader: Loader, forward: str
) -> tuple[int, QkMode | None]:
    """Turn the q and k norms of `attention` native, in place; returns how many, and their mode.

    `forward` is the digest of the attention that was read; another one keeps vLLM's norms.
    """
    if statements_digest(type(attention).forward) != forward or not all(
        type(getattr(attention, name, None)) is GemmaRMSNorm for name in ("q_norm", "k_norm")
    ):
        return 0, None
    wanted = wanted_qk_mode()
    mode = wanted or "cached"
    if mode == "cached" and (reason := _not_cached(attention, vllm_config)):
        say = logger.info_once if wanted is None else logger.warning_once
        say("gemma-fold: vLLM rotates q and k and writes the KV cache: %s", reason)
        mode = _uncached_qk_mode(vllm_config)
    for norm in (attention.q_norm, attention.k_norm):
        adopt(norm, _CLASSES[mode], loader)
    if mode == "cached":
        from gemma_fold.engines.vllm.cached import take_over

        take_over(attention, vllm_config)
    if mode == "fused":
        attention.qkv_proj.register_forward_hook(_QkHook(attention))
    return 2, mode


def _not_cached(attention: Any, vllm_config: Any) -> str:
    """Why vLLM is to write the cache of `attention`; empty if it need not."""
    try:
        # Imported here: other modes need none of it.
        from gemma_fold.engines.vllm.cached import problem

        return problem(attention, vllm_config)
    except (ImportError, AttributeError) as error:
        return f"vLLM has changed: {error}"


class _QkHook:
    """Norms the q and k heads in the output of their projection, [tokens, (q, k, v)], in place."""

    def __init__(self, attention: Any) -> None:
        self._heads = attention.num_heads, attention.num_kv_heads
        self._ends = attention.q_size, attention.q_size + attention.kv_size
        self._norms = attention.q_norm, attention.k_norm

    def __call__(self, module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
        qkv = output[0]
        q_heads, k_heads = self._heads
        q_end, k_end = self._ends
        q_norm, k_norm = self._norms
        ops.qk_rms_norm(
            qkv[..., :q_end].view(*qkv.shape[:-1], q_heads, -1),
            qkv[..., q_end:k_end].view(*qkv.shape[:-1], k_heads, -1),
            q_norm.gamma,
            k_norm.gamma,
            q_norm.variance_epsilon,
        )
