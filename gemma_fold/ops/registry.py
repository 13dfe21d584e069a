"""Registers the operators of :mod:`gemma_fold.ops.dispatch` as ``torch.ops.gemma_fold.*``.

Registration gives torch.compile, export and autograd what they need: schemas, shape-only
implementations and, for ``rms_norm``, a backward. Eager calls go around it (see
:mod:`gemma_fold.ops`), because the dispatcher costs more host time than a small norm takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from gemma_fold.ops import checks, dispatch, reference
from gemma_fold.ops.collectives import operators

_LIBRARY = torch.library.Library("gemma_fold", "FRAGMENT")  # type: ignore[no-untyped-call]
_FP8 = torch.float8_e4m3fn


def _define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    name = schema.partition("(")[0]
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"gemma_fold::{name}", fake, lib=_LIBRARY)


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return checks.empty_rows(x, dtype or x.dtype)


def _quantized(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], 1) if scale is None else (0,)
    return _like(x, _FP8), x.new_empty(shape, dtype=torch.float32)


def _own_scale(implementation: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """An operator may not return its input: a static scale comes back as an empty tensor."""

    @wraps(implementation)
    def run(*args: Any) -> tuple[Tensor, ...]:
        y, scale, *rest = implementation(*args)
        return (y, scale if args[-1] is None else scale.new_empty(0), *rest)

    return run


def _in_place(check: Callable[..., None], operands: int) -> Callable[..., None]:
    """The shape-only form of an operator that returns nothing: its checks."""
    return lambda *args: check(*args[:operands])


def _fake_rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    dispatch.check_rms_norm(x, gamma)
    return _like(x)


def _fake_backward(grad: Tensor, x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(gamma)


def _fake_add(x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dispatch.check_add(x, residual, gamma)
    return _like(x), _like(x)


def _fake_sandwich(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
) -> tuple[Tensor, Tensor]:
    dispatch.check_sandwich(x, residual, post_gamma, pre_gamma)
    return _like(x), _like(x)


def _fake_qk(
    q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dispatch.check_qk(q, k, q_gamma, k_gamma)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_qk_rope(
    q: Tensor,
    k: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos_sin: Tensor,
    positions: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    dispatch.check_qk_rope(q, k, q_gamma, k_gamma, cos_sin, positions)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_fp8(x: Tensor, gamma: Tensor, eps: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    dispatch.check_rms_norm(x, gamma)
    return _quantized(x, scale)


def _fake_add_fp8(
    x: Tensor, residual: Tensor, gamma: Tensor, eps: float, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.check_add(x, residual, gamma)
    return (*_quantized(x, scale), _like(x))


def _fake_sandwich_fp8(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.check_sandwich(x, residual, post_gamma, pre_gamma)
    return (*_quantized(x, scale), _like(x))


def _fake_all_reduce(x: Tensor, workspace: str) -> Tensor:
    checks.check_activation(x, "x")
    return x.new_empty(x.shape)


def _fake_reduce_add(
    x: Tensor, residual: Tensor, gamma: Tensor, eps: float, workspace: str
) -> tuple[Tensor, Tensor]:
    dispatch.check_add(x, residual, gamma)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_reduce_sandwich(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
    workspace: str,
) -> tuple[Tensor, Tensor]:
    dispatch.check_sandwich(x, residual, post_gamma, pre_gamma)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_reduce_add_fp8(
    x: Tensor, residual: Tensor, gamma: Tensor, eps: float, workspace: str, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.check_add(x, residual, gamma)
    return (*_quantized(x, scale), x.new_empty(x.shape))


def _fake_reduce_sandwich_fp8(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
    workspace: str,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.check_sandwich(x, residual, post_gamma, pre_gamma)
    return (*_quantized(x, scale), x.new_empty(x.shape))


_NORM = "Tensor x, Tensor gamma, float eps"
_ADD = "Tensor x, Tensor residual, Tensor gamma, float eps"
_SANDWICH = (
    "Tensor x, Tensor residual, Tensor post_gamma, Tensor pre_gamma, float post_eps, float pre_eps"
)
_ROPE = (
    "Tensor q_gamma, Tensor k_gamma, Tensor cos_sin, Tensor? positions, float eps, bool interleaved"
)


def _written(arguments: str) -> str:
    """The same operands, x and the residual written in place."""
    named = arguments.replace("Tensor x", "Tensor(a!) x")
    return named.replace("Tensor residual", "Tensor(b!) residual")


_define(f"rms_norm({_NORM}) -> Tensor", dispatch.rms_norm, _fake_rms_norm)
_define(
    f"rms_norm_backward(Tensor grad, {_NORM}) -> (Tensor, Tensor)",
    dispatch.rms_norm_backward,
    _fake_backward,
)
_define(f"add_rms_norm({_ADD}) -> (Tensor, Tensor)", dispatch.add_rms_norm, _fake_add)
_define(
    f"rms_norm_add_rms_norm({_SANDWICH}) -> (Tensor, Tensor)",
    dispatch.rms_norm_add_rms_norm,
    _fake_sandwich,
)
_define(
    f"add_rms_norm_({_written(_ADD)}) -> ()",
    dispatch.add_rms_norm_,
    _in_place(dispatch.check_add, 3),
)
_define(
    f"rms_norm_add_rms_norm_({_written(_SANDWICH)}) -> ()",
    dispatch.rms_norm_add_rms_norm_,
    _in_place(dispatch.check_sandwich, 4),
)
_define(
    "qk_rms_norm(Tensor q, Tensor k, Tensor q_gamma, Tensor k_gamma, float eps)"
    " -> (Tensor, Tensor)",
    dispatch.qk_rms_norm,
    _fake_qk,
)
_define(
    "qk_rms_norm_(Tensor(a!) q, Tensor(b!) k, Tensor q_gamma, Tensor k_gamma, float eps) -> ()",
    dispatch.qk_rms_norm_,
    _in_place(dispatch.check_qk, 4),
)
_define(
    f"qk_rms_norm_rope(Tensor q, Tensor k, {_ROPE}) -> (Tensor, Tensor)",
    dispatch.qk_rms_norm_rope,
    _fake_qk_rope,
)
_define(
    f"qk_rms_norm_rope_(Tensor(a!) q, Tensor(b!) k, {_ROPE}) -> ()",
    dispatch.qk_rms_norm_rope_,
    _in_place(dispatch.check_qk_rope, 6),
)
_define(
    f"rms_norm_fp8({_NORM}, Tensor? scale) -> (Tensor, Tensor)",
    _own_scale(dispatch.rms_norm_fp8),
    _fake_fp8,
)
_define(
    f"add_rms_norm_fp8({_ADD}, Tensor? scale) -> (Tensor, Tensor, Tensor)",
    _own_scale(dispatch.add_rms_norm_fp8),
    _fake_add_fp8,
)
_define(
    f"rms_norm_add_rms_norm_fp8({_SANDWICH}, Tensor? scale) -> (Tensor, Tensor, Tensor)",
    _own_scale(dispatch.rms_norm_add_rms_norm_fp8),
    _fake_sandwich_fp8,
)
_define("all_reduce(Tensor x, str workspace) -> Tensor", operators.all_reduce, _fake_all_reduce)
_define(
    f"all_reduce_add_rms_norm({_ADD}, str workspace) -> (Tensor, Tensor)",
    operators.all_reduce_add_rms_norm,
    _fake_reduce_add,
)
_define(
    f"all_reduce_rms_norm_add_rms_norm({_SANDWICH}, str workspace) -> (Tensor, Tensor)",
    operators.all_reduce_rms_norm_add_rms_norm,
    _fake_reduce_sandwich,
)
_define(
    f"all_reduce_add_rms_norm_fp8({_ADD}, str workspace, Tensor? scale)"
    " -> (Tensor, Tensor, Tensor)",
    _own_scale(operators.all_reduce_add_rms_norm_fp8),
    _fake_reduce_add_fp8,
)
_define(
    f"all_reduce_rms_norm_add_rms_norm_fp8({_SANDWICH}, str workspace, Tensor? scale)"
    " -> (Tensor, Tensor, Tensor)",
    _own_scale(operators.all_reduce_rms_norm_add_rms_norm_fp8),
    _fake_reduce_sandwich_fp8,
)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    x, gamma, ctx.eps = inputs
    ctx.save_for_backward(x, gamma)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, gamma = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # create_graph: the gradient is differentiated, too, for which the kernel has no backward.
        dx, dgamma = reference.rms_norm_backward(grad, x, gamma, ctx.eps)
    else:
        dx, dgamma = torch.ops.gemma_fold.rms_norm_backward(grad, x, gamma, ctx.eps)
    return dx, dgamma, None


torch.library.register_autograd(
    "gemma_fold::rms_norm", _backward, setup_context=_save_for_backward, lib=_LIBRARY
)
