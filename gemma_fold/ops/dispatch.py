"""One implementation per operator: check the operands, then run Triton or the reference.

CUDA tensors go to the Triton kernels. CPU tensors go to the reference, or, when Triton's
interpreter is on (``TRITON_INTERPRET=1``), through the very same kernels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gemma_fold.ops import checks, reference
from gemma_fold.ops.reference import FP8

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Fp8Pair = tuple[Tensor, Tensor]
Fp8Triple = tuple[Tensor, Tensor, Tensor]


def check_rms_norm(x: Tensor, gamma: Tensor) -> None:
    checks.check_activation(x, "x")
    checks.check_gamma(gamma, x, "gamma")


def check_add(x: Tensor, residual: Tensor, gamma: Tensor) -> None:
    check_rms_norm(x, gamma)
    checks.check_same(residual, x, "residual")


def check_sandwich(x: Tensor, residual: Tensor, post_gamma: Tensor, pre_gamma: Tensor) -> None:
    checks.check_activation(x, "x")
    checks.check_gamma(post_gamma, x, "post_gamma")
    checks.check_gamma(pre_gamma, x, "pre_gamma")
    checks.check_same(residual, x, "residual")


def check_qk(q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor) -> None:
    for name, heads, gamma in (("q", q, q_gamma), ("k", k, k_gamma)):
        checks.check_activation(heads, name)
        checks.check_gamma(gamma, heads, f"{name}_gamma")
        if heads.dim() < 2:
            raise ValueError(f"{name} must be [..., heads, head_dim], not {list(heads.shape)}")
    if q.dtype != k.dtype or q.device != k.device:
        raise TypeError(f"q ({q.dtype}, {q.device}) and k ({k.dtype}, {k.device}) must match")
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} may differ only in heads")


def check_qk_rope(
    q: Tensor,
    k: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos_sin: Tensor,
    positions: Tensor | None,
) -> None:
    check_qk(q, k, q_gamma, k_gamma)
    checks.check_rotary(cos_sin, positions, q)


@cache
def _launch() -> ModuleType:
    """The Triton side, imported when it is first needed: CPU users need no Triton."""
    from gemma_fold.ops import launch

    return launch


# What was checked and chosen for tensors of these shapes, strides, dtypes and devices. A hit
# replaces all the checks below: host time is what a small norm costs in eager mode.
_plans: dict[tuple[Any, ...], Any] = {}
_MOST_PLANS = 16384
_empty_like = torch.empty_like


def _facts(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.get_device()


def _all_facts(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return tuple([None if x is None else _facts(x) for x in tensors])


def _remember(key: tuple[Any, ...], plan: Any) -> Any:
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def _reference_runs(x: Tensor) -> bool:
    return not (x.is_cuda or _INTERPRETED)


def _empty(x: Tensor, plan: Any) -> Tensor:
    return _empty_like(x) if plan.dense else x.new_empty(x.shape)


def _mode(scale: Tensor | None) -> str:
    return "per_token" if scale is None else "static"


def _scale_for(x: Tensor, scale: Tensor | None) -> Tensor:
    """Where the kernel reads the static scale, or writes one scale per row."""
    if scale is not None:
        return scale
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    key = ("rms_norm", *_facts(x), *_facts(gamma))
    plan = _plans.get(key)
    if plan is None:
        check_rms_norm(x, gamma)
        if _reference_runs(x):
            return reference.rms_norm(x, gamma, eps)
        order = checks.memory_order(x)
        if order is not None:
            return rms_norm(x.permute(order), gamma, eps).permute(checks.inverse(order))
        plan = _remember(key, _launch().plan_rms_norm(x))
    y = _empty(x, plan)
    plan((x, gamma, y, None), (eps,))
    return y


def rms_norm_backward(grad: Tensor, x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_rms_norm(x, gamma)
    checks.check_same(grad, x, "grad")
    if _reference_runs(x):
        dx, dgamma = reference.rms_norm_backward(grad, x, gamma, eps)
        return dx.contiguous(), dgamma
    x, grad = x.contiguous(), grad.contiguous()
    plan = _launch().plan_rms_norm_backward(x, grad)
    dx = torch.empty_like(x)
    partial = x.new_empty((plan.programs, x.shape[-1]), dtype=torch.float32)
    plan((grad, x, gamma, dx, partial), (eps,))
    return dx, partial.sum(0)


def add_rms_norm(x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    key = ("add_rms_norm", *_facts(x), *_facts(residual), *_facts(gamma))
    plan = _plans.get(key)
    if plan is None:
        check_add(x, residual, gamma)
        if _reference_runs(x):
            return reference.add_rms_norm(x, residual, gamma, eps)
        plan = _remember(key, _launch().plan_add_rms_norm(x, residual))
    y, total = _empty(x, plan), _empty(x, plan)
    plan((x, residual, gamma, y, total, None), (eps,))
    return y, total


def rms_norm_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
) -> tuple[Tensor, Tensor]:
    key = ("sandwich", *_facts(x), *_facts(residual), *_facts(post_gamma), *_facts(pre_gamma))
    plan = _plans.get(key)
    if plan is None:
        check_sandwich(x, residual, post_gamma, pre_gamma)
        if _reference_runs(x):
            return reference.rms_norm_add_rms_norm(
                x, residual, post_gamma, pre_gamma, post_eps, pre_eps
            )
        plan = _remember(key, _launch().plan_rms_norm_add_rms_norm(x, residual))
    y, total = _empty(x, plan), _empty(x, plan)
    plan((x, residual, post_gamma, pre_gamma, y, total, None), (post_eps, pre_eps))
    return y, total


def add_rms_norm_(x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> None:
    key = ("add_rms_norm_", *_facts(x), *_facts(residual), *_facts(gamma))
    plan = _plans.get(key)
    if plan is None or checks.shares_memory(x, residual):
        check_add(x, residual, gamma)
        checks.check_in_place(x, residual)
        if _reference_runs(x):
            y, total = reference.add_rms_norm(x, residual, gamma, eps)
            x.copy_(y)
            residual.copy_(total)
            return
        plan = _remember(key, _launch().plan_add_rms_norm(x, residual))
    plan((x, residual, gamma, x, residual, None), (eps,))


def rms_norm_add_rms_norm_(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
) -> None:
    key = ("sandwich_", *_facts(x), *_facts(residual), *_facts(post_gamma), *_facts(pre_gamma))
    plan = _plans.get(key)
    if plan is None or checks.shares_memory(x, residual):
        check_sandwich(x, residual, post_gamma, pre_gamma)
        checks.check_in_place(x, residual)
        if _reference_runs(x):
            y, total = reference.rms_norm_add_rms_norm(
                x, residual, post_gamma, pre_gamma, post_eps, pre_eps
            )
            x.copy_(y)
            residual.copy_(total)
            return
        plan = _remember(key, _launch().plan_rms_norm_add_rms_norm(x, residual))
    plan((x, residual, post_gamma, pre_gamma, x, residual, None), (post_eps, pre_eps))


def qk_rms_norm(
    q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    key = ("qk_rms_norm", *_facts(q), *_facts(k), *_facts(q_gamma), *_facts(k_gamma))
    plan = _plans.get(key)
    if plan is None:
        check_qk(q, k, q_gamma, k_gamma)
        if _reference_runs(q):
            normed = reference.rms_norm(q, q_gamma, eps), reference.rms_norm(k, k_gamma, eps)
            return normed[0].contiguous(), normed[1].contiguous()
        plan = _remember(key, _launch().plan_qk_rms_norm(q, k, False))
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    plan((q, k, q_out, k_out, q_gamma, k_gamma), (eps,))
    return q_out, k_out


def qk_rms_norm_(q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor, eps: float) -> None:
    # Where k lies relative to q decides whether they overlap; separate tensors are checked anew.
    apart = k.data_ptr() - q.data_ptr()
    key = ("qk_rms_norm_", apart, *_facts(q), *_facts(k), *_facts(q_gamma), *_facts(k_gamma))
    plan = _plans.get(key)
    if plan is None:
        check_qk(q, k, q_gamma, k_gamma)
        checks.check_disjoint(q, k)
        if _reference_runs(q):
            reference.qk_rms_norm(q, k, q_gamma, k_gamma, eps)
            return
        plan = _remember(key, _launch().plan_qk_rms_norm(q, k, True))
    plan((q, k, q, k, q_gamma, k_gamma), (eps,))


def qk_rms_norm_rope(
    q: Tensor,
    k: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos_sin: Tensor,
    positions: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    tensors = (q, k, q_gamma, k_gamma, cos_sin, positions)
    key = ("qk_rms_norm_rope", interleaved, *_all_facts(tensors))
    plan = _plans.get(key)
    if plan is None:
        check_qk_rope(*tensors)
        if _reference_runs(q):
            q_out, k_out = reference.qk_rms_norm_rope(*tensors, eps, interleaved)
            return q_out.contiguous(), k_out.contiguous()
        plan = _remember(key, _launch().plan_qk_rms_norm_rope(q, k, cos_sin, interleaved, False))
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    plan((q, k, q_out, k_out, q_gamma, k_gamma, cos_sin, positions), (eps,))
    return q_out, k_out


def qk_rms_norm_rope_(
    q: Tensor,
    k: Tensor,
    q_gamma: Tensor,
    k_gamma: Tensor,
    cos_sin: Tensor,
    positions: Tensor | None,
    eps: float,
    interleaved: bool,
) -> None:
    tensors = (q, k, q_gamma, k_gamma, cos_sin, positions)
    key = ("qk_rms_norm_rope_", k.data_ptr() - q.data_ptr(), interleaved, *_all_facts(tensors))
    plan = _plans.get(key)
    if plan is None:
        check_qk_rope(*tensors)
        checks.check_disjoint(q, k)
        if _reference_runs(q):
            q_out, k_out = reference.qk_rms_norm_rope(*tensors, eps, interleaved)
            q.copy_(q_out)
            k.copy_(k_out)
            return
        plan = _remember(key, _launch().plan_qk_rms_norm_rope(q, k, cos_sin, interleaved, True))
    plan((q, k, q, k, q_gamma, k_gamma, cos_sin, positions), (eps,))


def rms_norm_fp8(x: Tensor, gamma: Tensor, eps: float, scale: Tensor | None) -> Fp8Pair:
    key = ("rms_norm_fp8", *_facts(x), *_facts(gamma), scale is None)
    plan = _plans.get(key)
    checks.check_scale(scale, x)
    if plan is None:
        check_rms_norm(x, gamma)
        if _reference_runs(x):
            return reference.quantize(reference.rms_norm(x, gamma, eps), scale)
        checks.check_fp8(x)
        plan = _remember(key, _launch().plan_rms_norm(x, _mode(scale)))
    y, scales = x.new_empty(x.shape, dtype=FP8), _scale_for(x, scale)
    plan((x, gamma, y, scales), (eps,))
    return y, scales


def add_rms_norm_fp8(
    x: Tensor, residual: Tensor, gamma: Tensor, eps: float, scale: Tensor | None
) -> Fp8Triple:
    key = ("add_rms_norm_fp8", *_facts(x), *_facts(residual), *_facts(gamma), scale is None)
    plan = _plans.get(key)
    checks.check_scale(scale, x)
    if plan is None:
        check_add(x, residual, gamma)
        if _reference_runs(x):
            y, total = reference.add_rms_norm(x, residual, gamma, eps)
            return (*reference.quantize(y, scale), total)
        checks.check_fp8(x)
        plan = _remember(key, _launch().plan_add_rms_norm(x, residual, _mode(scale)))
    y, scales = x.new_empty(x.shape, dtype=FP8), _scale_for(x, scale)
    total = _empty(x, plan)
    plan((x, residual, gamma, y, total, scales), (eps,))
    return y, scales, total


def rms_norm_add_rms_norm_fp8(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
    scale: Tensor | None,
) -> Fp8Triple:
    gammas = (*_facts(post_gamma), *_facts(pre_gamma))
    key = ("sandwich_fp8", *_facts(x), *_facts(residual), *gammas, scale is None)
    plan = _plans.get(key)
    checks.check_scale(scale, x)
    if plan is None:
        check_sandwich(x, residual, post_gamma, pre_gamma)
        if _reference_runs(x):
            y, total = reference.rms_norm_add_rms_norm(
                x, residual, post_gamma, pre_gamma, post_eps, pre_eps
            )
            return (*reference.quantize(y, scale), total)
        checks.check_fp8(x)
        plan = _remember(key, _launch().plan_rms_norm_add_rms_norm(x, residual, _mode(scale)))
    y, scales = x.new_empty(x.shape, dtype=FP8), _scale_for(x, scale)
    total = _empty(x, plan)
    plan((x, residual, post_gamma, pre_gamma, y, total, scales), (post_eps, pre_eps))
    return y, scales, total
