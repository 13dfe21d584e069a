"""RMSNorm and rotary embedding of q and k, and k and v into a paged cache, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_fold.ops import checks
from gemma_fold.ops.operators import base
from gemma_fold.ops.operators.qk_rms_norm_rope import check_rotary, plan_table, rows_at
from gemma_fold.ops.operators.qk_rms_norm_rope import reference as norm_and_rotate

if TYPE_CHECKING:
    from gemma_fold.ops.launch import Plan


def rows_of_axes(
    cos_sin: Tensor, positions: Tensor, section: Sequence[int], in_turn: bool
) -> Tensor:
    """One row of ``cos_sin`` a token, [tokens, rotary_dim], from three ``positions`` [3, tokens].

    ``section`` says how many pairs turn by time, height and width: one after another or,
    ``in_turn``, time, height, width, time and so on, until height's and width's are used up.
    """
    pair = torch.arange(cos_sin.shape[-1] // 2, device=cos_sin.device)
    time, height, width = section
    if in_turn:
        is_height = (pair % 3 == 1) & (pair < 3 * height)
        is_width = (pair % 3 == 2) & (pair < 3 * width)
    else:
        is_height = (pair >= time) & (pair < time + height)
        is_width = pair >= time + height
    axis = is_height.long() + 2 * is_width.long()
    column = torch.arange(cos_sin.shape[-1], device=cos_sin.device)
    return rows_at(cos_sin, positions)[axis.repeat(2), :, column].transpose(0, 1)


def write(x: Tensor, cache: Tensor, slots: Tensor, scale: Tensor | None) -> None:
    """The heads ``x`` [tokens, heads, head_dim] of each token into its slot of ``cache``.

    Tokens without a slot, and slots that the cache does not hold, are left out. ``scale``: what
    values are divided by before they are rounded to e4m3.
    """
    if scale is not None:
        top = base.FP8_MAX
        x = (x.float() / scale).clamp(-top, top).to(cache.dtype)
    page = cache.shape[1] if cache.dim() == 4 else 1
    held = (slots >= 0) & (slots < cache.shape[0] * page)
    slots, x = slots[held].long(), x[: held.shape[0]][held]
    # As bytes, which every version of torch can scatter.
    bytes_of = torch.uint8 if scale is not None else x.dtype
    at = (slots // page, slots % page) if cache.dim() == 4 else (slots,)
    cache.view(bytes_of)[at] = x.view(bytes_of)


def reference(
    q: Tensor, k: Tensor, v: Tensor, q_gamma: Tensor, k_gamma: Tensor,
    cos_sin: Tensor, positions: Tensor | None, key_cache: Tensor, value_cache: Tensor,
    slots: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
    eps: float, interleaved: bool, time: int, height: int, width: int, in_turn: bool,
) -> Tensor:  # fmt: skip
    """The new q. ``qk_rms_norm_rope``, then :func:`write` of its k and of ``v``."""
    if time + height + width:
        assert positions is not None
        cos_sin = rows_of_axes(cos_sin, positions, (time, height, width), in_turn)
        positions = None
    q, k = norm_and_rotate(q, k, q_gamma, k_gamma, cos_sin, positions, eps, interleaved)
    write(k, key_cache, slots, k_scale)
    write(v, value_cache, slots, v_scale)
    return q


def plan(tensors: Any, in_place: bool, interleaved: bool, *axes: Any) -> Plan:
    """Called with q, k, v, the q that is written and the other operands of :func:`reference`."""
    from gemma_fold.ops import launch
    from gemma_fold.ops.kernels import qk_rms_norm_rope_cache as kernels

    q, k, v, _, _, cos_sin, positions, cache, _, slots, *_ = tensors
    time, height, width, in_turn = axes
    by_axes = kernels.IN_TURN if in_turn else kernels.SECTIONS
    paged = cache if cache.dim() == 4 else cache.unsqueeze(1)
    unit, steps = launch.steps(cache, paged.stride()[:3])
    scalars, constants = plan_table(cos_sin, interleaved)
    constants |= {
        "CACHE_UNIT": unit,
        "PAGE": paged.shape[1],
        "AXES": (by_axes if time + height + width else kernels.ONE).value,
        "T": time,
        "HEIGHT": height,
        "WIDTH": width,
    }
    axis_step = positions.stride(0) if positions is not None else 0
    sizes = slots.shape[0], paged.shape[0] * paged.shape[1]
    return launch.plan_heads(
        kernels.qk_rms_norm_rope_cache_kernel,
        (q, k, v),
        in_place,
        (*scalars, axis_step, *steps, *sizes),
        constants,
        written=1,
    )


def _check_cache(k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    if k.dim() != 3 or v.shape != k.shape:
        raise ValueError(
            f"k {list(k.shape)} and v {list(v.shape)} must both be [tokens, heads, head_dim]"
        )
    if v.dtype != k.dtype or v.device != k.device:
        raise TypeError(f"v ({v.dtype}, {v.device}) and k ({k.dtype}, {k.device}) must match")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dtype not in (k.dtype, base.FP8):
            raise TypeError(f"{name} must be {k.dtype} as k is or {base.FP8}, not {cache.dtype}")
        if cache.device != k.device:
            raise ValueError(f"{name} is on {cache.device} but k is on {k.device}")
        if cache.dim() not in (3, 4) or cache.shape[-2:] != k.shape[-2:] or 0 in cache.shape:
            heads = f"{k.shape[-2]}, {k.shape[-1]}]"
            raise ValueError(
                f"{name} must be [blocks, block_size, {heads} or [slots, {heads}, "
                f"not {list(cache.shape)}"
            )
        if cache.shape[-1] > 1 and cache.stride(-1) != 1:
            raise ValueError(f"{name} with strides {list(cache.stride())} has non-contiguous heads")
    if value_cache.dtype != key_cache.dtype or value_cache.shape != key_cache.shape:
        raise ValueError(
            f"key_cache ({key_cache.dtype}, {list(key_cache.shape)}) and value_cache "
            f"({value_cache.dtype}, {list(value_cache.shape)}) must match"
        )
    if value_cache.stride() != key_cache.stride():
        raise ValueError(
            f"key_cache and value_cache must have the same strides, not {key_cache.stride()} "
            f"and {value_cache.stride()}"
        )


def _check_slots(slots: Tensor, tokens: int, device: torch.device) -> None:
    if slots.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"slots must be int32 or int64, not {slots.dtype}")
    if slots.dim() != 1 or slots.shape[0] > tokens:
        raise ValueError(f"slots must be [at most {tokens}], one a token, not {list(slots.shape)}")
    if slots.device != device:
        raise ValueError(f"slots is on {slots.device} but q is on {device}")
    if not slots.is_contiguous():
        raise ValueError("slots must be contiguous")


def _check_scale(scale: Tensor | None, name: str, cache: Tensor, k: Tensor) -> None:
    if (scale is not None) != (cache.dtype != k.dtype):
        raise ValueError(
            f"{name} is what a cache of {base.FP8} needs, and no other one; this cache is "
            f"{cache.dtype}"
        )
    checks.check_scale(scale, k)


def _check_axes(cos_sin: Tensor, positions: Tensor | None, section: Sequence[int]) -> None:
    """Each pair has one of three positions."""
    if min(section) < 0 or sum(section) != cos_sin.shape[-1] // 2:
        raise ValueError(
            f"mrope_section {list(section)} must be three numbers that add up to "
            f"{cos_sin.shape[-1] // 2}, half of rotary_dim"
        )
    if positions is None or positions.dim() != 2 or positions.shape[0] != 3:
        found = None if positions is None else list(positions.shape)
        raise ValueError(f"positions must be [3, tokens] with mrope_section, not {found}")


class CacheOperator(base.Operator[Tensor]):
    """The operator, in two forms: it returns the new q, or it writes it over the old one."""

    def __init__(self) -> None:
        super().__init__("qk_rms_norm_rope_cache", reference, plan)
        self.no_backward = (
            f"{self.name} writes a cache and has no derivative; use rms_norm and a rotary "
            "embedding of its own to train"
        )
        caches = {"key_cache": "b", "value_cache": "c"}
        self.traced = self._register(self.name, caches, 1, self.call)
        self._register(self.name_in_place, {"q": "a", **caches}, 0, self.call_in_place)

    def _register(self, name: str, written: dict[str, str], returns: int, run: base.Run) -> Any:
        arguments = []
        for argument in self.arguments:
            kind, _, operand = argument.partition(" ")
            mark = written.get(operand)
            arguments.append(f"{kind}({mark}!) {operand}" if mark else argument)
        n = len(self.operands)

        def fake(*args: Any) -> Tensor | None:
            self.check_call(args[:n], args[n:])
            return args[0].new_empty(args[0].shape) if returns else None

        return base.register(
            name, arguments, returns, lambda *args: run(args[:n], args[n:], True), fake
        )

    def check_call(self, tensors: Any, rest: Any) -> None:
        """Raises TypeError or ValueError for operands that the kernel does not take."""
        q, k, v, q_gamma, k_gamma, cos_sin, positions, key_cache, value_cache, slots, *scales = (
            tensors
        )
        base.check_heads(q, k, q_gamma, k_gamma)
        _check_cache(k, v, key_cache, value_cache)
        section = rest[2:5]
        if any(section):
            _check_axes(cos_sin, positions, section)
            check_rotary(q, cos_sin, positions[0])
        else:
            check_rotary(q, cos_sin, positions)
        _check_slots(slots, q.shape[0], q.device)
        for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            _check_scale(scale, name, key_cache, k)
        if key_cache.dtype == base.FP8:
            checks.check_fp8(q)

    def _check_memory(self, tensors: Any) -> None:
        q, k, v, *_ = tensors
        key_cache, value_cache = tensors[7:9]
        checks.check_disjoint(q, k)
        checks.check_disjoint(q, v, "v")
        for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
            checks.check_distinct(cache, name)
        checks.check_apart(key_cache, value_cache, "key_cache and value_cache")

    def _plan(self, tensors: Any, rest: Any, in_place: bool) -> Plan | None:
        """How the kernel runs; None where the reference does."""
        q, k, v = tensors[:3]
        # Where they lie relative to one another decides whether they overlap.
        start = q.data_ptr()
        apart = k.data_ptr() - start, v.data_ptr() - start
        caches = tensors[8].data_ptr() - tensors[7].data_ptr()
        key = base._key((self.name, in_place, apart, caches, rest[1:]), tensors)
        found = base._plans.get(key)
        if found is None:
            self.check_call(tensors, rest)
            self._check_memory(tensors)
            if checks.reference_runs(q):
                return None
            found = base._remember(key, self.plan(tensors, in_place, *rest[1:]))
        return found

    def call(self, tensors: Any, rest: Any, bare: bool = False) -> Tensor:
        """The plain form, which nothing but the dispatcher calls."""
        plan = self._plan(tensors, rest, False)
        if plan is None:
            return self.reference(*tensors, *rest).contiguous()
        q_out = tensors[0].new_empty(tensors[0].shape)
        plan((*tensors[:3], q_out, *tensors[3:]), rest[:1])
        return q_out  # type: ignore[no-any-return]

    def call_in_place(self, tensors: Any, rest: Any, bare: bool = False) -> None:
        """The new q over ``q``. Raises ValueError if it is to be differentiated."""
        q = tensors[0]
        if not bare and not base.runs_eagerly(q, tensors):
            if base.is_transformed() or (base._grad_enabled() and base._any_requires_grad(tensors)):
                raise ValueError(self.no_backward)
            q.copy_(self.traced(*tensors, *rest))
            return
        plan = self._plan(tensors, rest, True)
        if plan is None:
            q.copy_(self.reference(*tensors, *rest))
        else:
            plan((*tensors[:3], q, *tensors[3:]), rest[:1])


operator = CacheOperator()


def qk_rms_norm_rope_cache(
    q: Tensor, k: Tensor, v: Tensor, q_gamma: Tensor, k_gamma: Tensor,
    cos_sin: Tensor, positions: Tensor | None,
    key_cache: Tensor, value_cache: Tensor, slots: Tensor, eps: float = 1e-6, *,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, interleaved: bool = False,
    mrope_section: Sequence[int] | None = None, mrope_interleaved: bool = False,
) -> None:  # fmt: skip
    """:func:`qk_rms_norm_rope` of ``q``, in place, and of ``k``, into a cache, in one launch.

    ``q`` [tokens, q_heads, head_dim]; ``k`` and ``v`` [tokens, k_heads, head_dim], which stay as
    they are: what attends reads them from the cache. Gammas, ``cos_sin``, ``positions`` and
    ``interleaved``: as in :func:`qk_rms_norm_rope`, and so is every rounding.

    ``key_cache`` and ``value_cache``: [blocks, block_size, k_heads, head_dim], or
    [slots, k_heads, head_dim], of any strides that both share and whose last is one, so that heads
    may come before the places of a block. ``slots`` (int32 or int64, contiguous, [tokens] or fewer)
    says where k and v of each token go: block * block_size + place. A token without a slot, a
    negative slot and one that the cache does not hold write nothing. Of two tokens with one slot,
    either may win.

    The caches have the dtype of ``q``, or are float8_e4m3fn: then k, rounded to the dtype of ``q``,
    and v are divided by ``k_scale`` and ``v_scale``, one fp32 element each, and saturate.

    ``mrope_section``: how many of the rotary_dim / 2 pairs turn by which row of ``positions``
    [3, tokens] (unit stride between tokens): the first ones by row 0, then row 1, then row 2 or,
    ``mrope_interleaved``, by rows 0, 1, 2, 0 and so on until the pairs of a row are used up, and by
    row 0 from there. Not differentiable.
    """
    tensors = (
        q, k, v, q_gamma, k_gamma, cos_sin, positions, key_cache, value_cache, slots,
        k_scale, v_scale,
    )  # fmt: skip
    section = mrope_section or (0, 0, 0)
    if len(section) != 3:
        raise ValueError(f"mrope_section must be three numbers, not {list(section)}")
    operator.call_in_place(tensors, (eps, interleaved, *section, mrope_interleaved))
