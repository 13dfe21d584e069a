"""What the operators share: how they are declared, checked, planned and called.

An operator is declared by its reference, a function in plain torch that says what it computes. The
names and types of its arguments are the operator's schema, and choose the checks of its operands.
CUDA tensors run the kernel; CPU tensors run the reference or, when Triton's interpreter is on
(``TRITON_INTERPRET=1``), the very same kernel.

Registration as ``torch.ops.gemma_fold.*`` gives torch.compile and export what they need. Eager
calls go around it, because the dispatcher costs more host time than a small norm takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gemma_fold.ops import checks

if TYPE_CHECKING:
    from gemma_fold.ops.launch import Plan

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite e4m3fn value
# A row of zeros must not divide by zero; engines use this floor for per-token scales.
FP8_MIN_SCALE = 1.0 / (FP8_MAX * 512.0)

R = TypeVar("R")
Norm = Callable[[Tensor, Tensor, float], Tensor]
Run = Callable[..., Any]

LIBRARY = torch.library.Library("gemma_fold", "FRAGMENT")  # type: ignore[no-untyped-call]
# What was checked and chosen for tensors of these shapes, strides, dtypes and devices. A hit
# replaces all the checks: host time is what a small norm costs in eager mode.
_plans: dict[tuple[Any, ...], Plan] = {}
_MOST_PLANS = 16384
# Bound once: they run on every call, and a small norm is over in a few microseconds.
_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_empty_like = torch.empty_like
_grad_enabled = torch.is_grad_enabled
_transforms = torch._C._functorch.peek_interpreter_stack


def _any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    for x in tensors:  # noqa: SIM110  (a generator takes longer)
        if x is not None and x.requires_grad:
            return True
    return False


def runs_eagerly(x: Tensor, trained: Sequence[Tensor | None] = ()) -> bool:
    """Whether nothing watches a call of ``x``, and none of ``trained`` asks for a gradient.

    There is no tracing, dispatch mode, function transform or forward-mode differentiation. Only
    then may the dispatcher be skipped; it costs several microseconds of host time a call.
    """
    if (
        _compiling()
        or (type(x) is not Tensor and type(x) is not torch.nn.Parameter)
        or _dispatch_modes() != 0
        or _transforms() is not None
        or forward_ad._current_level >= 0
    ):
        return False
    return not (trained and _grad_enabled() and _any_requires_grad(trained))


def is_transformed() -> bool:
    """Whether a function transform or forward-mode differentiation may see this call.

    Torch gives operators no tangents, batching rules or higher derivatives of their own: such calls
    run the plain composition, which has them all. torch.compile cannot ask for transforms; it stops
    at those that differentiate backward, and traces the level of forward-mode differentiation.
    """
    return forward_ad._current_level >= 0 or (not _compiling() and _transforms() is not None)


def register(name: str, arguments: Sequence[str], returns: int, run: Run, fake: Run) -> Any:
    """Make ``torch.ops.gemma_fold.<name>``, which returns so many tensors, and return it."""
    tensors = "Tensor" if returns == 1 else f"({', '.join(['Tensor'] * returns)})"
    schema = f"{name}({', '.join(arguments)}) -> {tensors}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"gemma_fold::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.gemma_fold, name)


def arguments_of(reference: Callable[..., Any]) -> list[str]:
    """The positional arguments of ``reference`` as a schema has them: ``Tensor? x``."""
    given = inspect.signature(reference).parameters.values()
    found = [f"{p.annotation} {p.name}" for p in given if p.kind is not p.KEYWORD_ONLY]
    return [argument.replace(" | None", "?") for argument in found]


def quantize(y: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """e4m3 of ``y / scale``, saturating; NaN stays NaN. Returns it and the fp32 scale(s).

    ``scale`` holds one fp32 element; ``None`` takes one scale per row, [..., 1], from its largest
    magnitude.
    """
    y32 = y.float()
    if scale is None:
        scale = (y32.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=FP8_MIN_SCALE)
    return (y32 * scale.reciprocal()).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def _key2(form: Any, tensors: Any) -> tuple[Any, ...]:
    a, b = tensors
    return (
        form, a.shape, a.stride(), a.dtype, a.get_device(),
        b.shape, b.stride(), b.dtype, b.get_device(),
    )  # fmt: skip


def _key3(form: Any, tensors: Any) -> tuple[Any, ...]:
    a, b, c = tensors
    return (
        form, a.shape, a.stride(), a.dtype, a.get_device(),
        b.shape, b.stride(), b.dtype, b.get_device(), c.shape, c.stride(), c.dtype, c.get_device(),
    )  # fmt: skip


def _key4(form: Any, tensors: Any) -> tuple[Any, ...]:
    a, b, c, d = tensors
    return (
        form, a.shape, a.stride(), a.dtype, a.get_device(),
        b.shape, b.stride(), b.dtype, b.get_device(), c.shape, c.stride(), c.dtype, c.get_device(),
        d.shape, d.stride(), d.dtype, d.get_device(),
    )  # fmt: skip


def _key(form: Any, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What decides how ``form`` of an operator runs for these tensors."""
    facts: list[Any] = [form]
    for x in tensors:
        facts.append(None if x is None else (x.shape, x.stride(), x.dtype, x.get_device()))
    return tuple(facts)


#: :func:`_key` written out for so many tensors, which takes a tenth less time.
_KEYS = {2: _key2, 3: _key3, 4: _key4}


def _remember(key: tuple[Any, ...], plan: Plan) -> Plan:
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def _copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=False):
        target.copy_(source)


class Operator(Generic[R]):
    """An operator in up to three forms, and what decides how a call of each runs.

    Methods take the operands as one tuple, and the other arguments as another.

    Args:
        name: of the plain form in ``torch.ops.gemma_fold``; other forms append to it.
        reference: what the plain form computes. Its positional arguments are the schema.
        plan: how the kernel runs for operands like those it is given.
        composed: the reference made of operators, for calls to be differentiated; None where the
            plain form has a backward of its own.
        extra: arguments of the schema after those of the reference.
    """

    traced: Callable[..., R]  # the plain form in torch.ops.gemma_fold
    no_backward: str  # why the form in place is refused where it would be differentiated

    def __init__(
        self,
        name: str,
        reference: Callable[..., R],
        plan: Callable[..., Plan],
        composed: Callable[..., R] | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        self.name, self.name_in_place, self.name_fp8 = name, f"{name}_", f"{name}_fp8"
        self.reference = reference
        self.plan = plan
        self.composed = composed
        self.arguments = [*arguments_of(reference), *extra]
        typed = [argument.split() for argument in self.arguments]
        self.operands = [name for kind, name in typed if kind.startswith("Tensor")]
        self.key: Callable[[Any, Any], Any] = _KEYS.get(len(self.operands), _key)

    def check(self, *tensors: Any) -> None:
        """Raises TypeError or ValueError for operands that the kernel does not take."""
        raise NotImplementedError

    def call(self, tensors: Any, rest: Any, bare: bool = False) -> R:
        """The plain form. ``bare``: it is torch's dispatcher that calls."""
        raise NotImplementedError

    def call_in_place(self, tensors: Any, rest: Any, bare: bool = False) -> None:
        """The form that writes its first two operands. Raises ValueError if differentiated."""
        raise NotImplementedError

    def watched(self, tensors: Any, rest: Any) -> R:
        """The plain form of a call that torch has to see."""
        trained = _grad_enabled() and _any_requires_grad(tensors)
        if is_transformed() or (trained and self.composed is not None):
            self.check(*tensors)
            return (self.composed or self.reference)(*tensors, *rest)
        return self.traced(*tensors, *rest)

    def watched_in_place(self, tensors: Any, rest: Any) -> None:
        """The form in place of a call that torch has to see. Raises ValueError for gradients."""
        if _grad_enabled() and _any_requires_grad(tensors):
            raise ValueError(self.no_backward)
        # Inductor can lose the offset of a view that a traced operator mutates; copies it fuses.
        _copy_each(tensors, self.watched(tensors, rest))  # type: ignore[arg-type]

    def register(
        self, name: str, arguments: Sequence[str], returns: int, run: Run, outputs: Run
    ) -> Any:
        """Register a form, ``run(tensors, rest, True)``; its fake gives ``outputs(*all)``."""
        n = len(self.operands)

        def fake(*args: Any) -> Any:
            self.check(*args[:n])
            return outputs(*args)

        return register(name, arguments, returns, lambda *args: run(args[:n], args[n:], True), fake)

    def register_in_place(self, no_backward: str) -> None:
        """Register the form in place."""
        self.no_backward = no_backward
        first, second, *others = self.arguments
        written = [a.replace("Tensor", f"Tensor({w}!)") for a, w in ((first, "a"), (second, "b"))]
        arguments = [*written, *others]
        self.register(self.name_in_place, arguments, 0, self.call_in_place, lambda *args: None)


class RowOperator(Operator[R]):
    """An operator on rows, [..., H], of ``x`` and perhaps of ``residual``.

    After these its operands are fp32 gammas, whose names end so; its other arguments are epsilons.
    It returns the norm and, where there is a residual, the new one. One form gives the norm as
    e4m3; where there is a residual, one works in place.
    """

    def __init__(self, *args: Any, in_place: bool = False, **named: Any) -> None:
        super().__init__(*args, **named)
        self.adds = "residual" in self.operands
        count = 1 + self.adds
        self.traced = self.register(self.name, self.arguments, count, self.call, self._outputs)
        arguments = [*self.arguments, "Tensor? scale"]
        self.traced_fp8 = self.register(
            self.name_fp8, arguments, count + 1, self._fp8_bare, self._outputs_fp8
        )
        if in_place:
            form = self.name_in_place
            self.register_in_place(f"{form} works in place and has no backward; use {self.name}")

    def check(self, *tensors: Tensor) -> None:
        """Raises TypeError or ValueError for operands that the kernel does not take."""
        x = tensors[0]
        checks.check_activation(x, "x")
        for name, gamma in zip(self.operands, tensors, strict=True):
            if name.endswith("gamma"):
                checks.check_gamma(gamma, x, name)
        if self.adds:
            checks.check_same(tensors[1], x, "residual")

    def call(self, tensors: Any, rest: Any, bare: bool = False) -> R:
        """The plain form. ``bare``: it is torch's dispatcher that calls."""
        x = tensors[0]
        if not bare and not runs_eagerly(x, tensors):
            return self.watched(tensors, rest)
        key = self.key(self.name, tensors)
        plan = _plans.get(key)
        if plan is None:
            return self._first_call(key, tensors, rest)
        y: Any = _empty_like(x) if plan.dense else x.new_empty(x.shape)
        if not self.adds:
            written: Any = y, None
            plan(tensors + written, rest)
            return y  # type: ignore[no-any-return]
        total = _empty_like(y)
        written = y, total, None
        plan(tensors + written, rest)
        return y, total  # type: ignore[return-value]

    def _first_call(self, key: tuple[Any, ...], tensors: Any, rest: Any) -> R:
        """The plain form of operands that have no plan."""
        self.check(*tensors)
        x, *others = tensors
        if checks.reference_runs(x):
            return self.reference(*tensors, *rest)
        order = None if self.adds else checks.memory_order(x)
        if order is not None:
            y: Any = self.call((x.permute(order), *others), rest, True)
            return y.permute(checks.inverse(order))  # type: ignore[no-any-return]
        _remember(key, self._plan_rows(tensors))
        return self.call(tensors, rest, True)

    def _plan_rows(self, tensors: Any, fp8: str | None = None) -> Plan:
        return self.plan(tensors[0], tensors[1] if self.adds else None, fp8)

    def call_in_place(self, tensors: Any, rest: Any, bare: bool = False) -> None:
        """The norm over ``x``, the new residual over the old. Raises ValueError if trained."""
        x, residual = tensors[0], tensors[1]
        if not bare and not runs_eagerly(x, tensors):
            return self.watched_in_place(tensors, rest)
        key = self.key(self.name_in_place, tensors)
        plan = _plans.get(key)
        if plan is None or checks.shares_memory(x, residual):
            self.check(*tensors)
            checks.check_in_place(x, residual)
            if checks.reference_runs(x):
                _copy_each(tensors, self.reference(*tensors, *rest))  # type: ignore[arg-type]
                return
            plan = _remember(key, self._plan_rows(tensors))
        written = x, residual, None
        plan(tensors + written, rest)

    def call_fp8(self, tensors: Any, rest: Any, scale: Tensor | None, bare: bool = False) -> Any:
        """The form with e4m3 output: the norm, its scale, the new residual."""
        x = tensors[0]
        if not bare and not runs_eagerly(x):
            return self.watched_fp8(tensors, rest, scale)
        key = self.key((self.name_fp8, scale is None), tensors)
        plan = _plans.get(key)
        checks.check_scale(scale, x)
        if plan is None:
            self.check(*tensors)
            if checks.reference_runs(x):
                outputs: Any = self.reference(*tensors, *rest)
                y, *total = outputs if self.adds else (outputs,)
                return (*(q.contiguous() for q in quantize(y, scale)), *total)
            checks.check_fp8(x)
            mode = "per_token" if scale is None else "static"
            plan = _remember(key, self._plan_rows(tensors, mode))
        y, scales = x.new_empty(x.shape, dtype=FP8), scale
        if scales is None:
            scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        if not self.adds:
            written: Any = y, scales
            plan(tensors + written, rest)
            return y, scales
        total = _empty_like(x) if plan.dense else x.new_empty(x.shape)
        written = y, total, scales
        plan(tensors + written, rest)
        return y, scales, total

    def watched_fp8(self, tensors: Any, rest: Any, scale: Tensor | None) -> Any:
        """The form with e4m3 output, of a call that torch has to see."""
        y, scales, *total = self.traced_fp8(*tensors, *rest, scale)
        return (y, scales if scale is None else scale, *total)

    def _fp8_bare(self, tensors: Any, rest: Any, bare: bool) -> tuple[Tensor, ...]:
        """An operator may not return its input: a static scale comes back as an empty tensor."""
        *others, scale = rest
        y, scales, *total = self.call_fp8(tensors, others, scale, bare)
        return (y, scales if scale is None else scales.new_empty(0), *total)

    def like(self, x: Tensor) -> Tensor:
        """What the fakes say of an output shaped like ``x`` and of its dtype."""
        return checks.empty_rows(x)

    def _outputs(self, x: Tensor, *others: Any) -> Any:
        y = self.like(x)
        return (y, self.like(x)) if self.adds else y

    def _outputs_fp8(self, x: Tensor, *others: Any) -> Any:
        shape = (*x.shape[:-1], 1) if others[-1] is None else (0,)
        scales = x.new_empty(shape, dtype=torch.float32)
        total = [self.like(x)] * self.adds
        return (x.new_empty(x.shape, dtype=FP8), scales, *total)


def check_heads(q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor) -> None:
    """Raises TypeError or ValueError unless q and k are heads of the same tokens, with gammas."""
    for name, heads, gamma in (("q", q, q_gamma), ("k", k, k_gamma)):
        checks.check_activation(heads, name)
        checks.check_gamma(gamma, heads, f"{name}_gamma")
        if heads.dim() < 2 or heads.shape[-2] == 0:
            raise ValueError(f"{name} must be [..., heads, head_dim], not {list(heads.shape)}")
    if q.dtype != k.dtype or q.device != k.device:
        raise TypeError(f"q ({q.dtype}, {q.device}) and k ({k.dtype}, {k.device}) must match")
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} may differ only in heads")


class HeadsOperator(Operator[tuple[Tensor, Tensor]]):
    """An operator on the heads of q and k, [..., heads, head_dim], in place for its callers.

    Its operands begin with ``q, k, q_gamma, k_gamma``, its other arguments with one epsilon; what
    follows that is part of what a plan is made for.

    Args:
        args: as of :class:`Operator`.
        instead: what to use where gradients are asked for.
        check_others: checks ``q`` and the operands after ``k_gamma``.
        named: as of :class:`Operator`.
    """

    def __init__(
        self,
        *args: Any,
        instead: str,
        check_others: Callable[..., None] | None = None,
        **named: Any,
    ) -> None:
        super().__init__(*args, **named)
        self.check_others = check_others
        self.traced = self.register(self.name, self.arguments, 2, self.call, self._outputs)
        self.register_in_place(
            f"{self.name} works in place and has no backward; use {instead} to train"
        )

    def check(self, *tensors: Any) -> None:
        """Raises TypeError or ValueError for operands that the kernel does not take."""
        q, k, q_gamma, k_gamma, *others = tensors
        check_heads(q, k, q_gamma, k_gamma)
        if self.check_others is not None:
            self.check_others(q, *others)

    def call(self, tensors: Any, rest: Any, bare: bool = False) -> tuple[Tensor, Tensor]:
        """The plain form, which nothing but the dispatcher calls."""
        q, k = tensors[0], tensors[1]
        key = self.key((self.name, rest[1:]), tensors)
        plan = _plans.get(key)
        if plan is None:
            self.check(*tensors)
            if checks.reference_runs(q):
                q_out, k_out = self.reference(*tensors, *rest)
                return q_out.contiguous(), k_out.contiguous()
            plan = _remember(key, self.plan(q, k, False, *tensors[4:], *rest[1:]))
        q_out, k_out = self._outputs(q, k)
        heads = q, k, q_out, k_out
        plan(heads + tensors[2:], rest[:1])
        return q_out, k_out

    def call_in_place(self, tensors: Any, rest: Any, bare: bool = False) -> None:
        """Results over ``q`` and ``k``. Raises ValueError if they are to be differentiated."""
        q, k = tensors[0], tensors[1]
        if not bare and not runs_eagerly(q, tensors):
            return self.watched_in_place(tensors, rest)
        # Where k lies relative to q decides whether they overlap; separate tensors are checked anew
        key = self.key((self.name_in_place, k.data_ptr() - q.data_ptr(), rest[1:]), tensors)
        plan = _plans.get(key)
        if plan is None:
            self.check(*tensors)
            checks.check_disjoint(q, k)
            if checks.reference_runs(q):
                _copy_each(tensors, self.reference(*tensors, *rest))
                return
            plan = _remember(key, self.plan(q, k, True, *tensors[4:], *rest[1:]))
        heads = q, k, q, k
        plan(heads + tensors[2:], rest[:1])

    def _outputs(self, q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape)
