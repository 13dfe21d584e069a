"""The one folded norm module: an fp32 gain that survives whatever users do to models.

A zero-centred norm becomes a :class:`FoldedNorm` in place: the module object stays, so hooks,
eps and every reference to it stay too; its class and its parameter change. The parameter keeps its
name and has shape [H, 1], as on disk. That is the tensor lock: in a state dict, [H, 1] is a gamma
and [H] a raw w, and neither can be loaded as the other by accident.

Modules also know whether anything is attached to them, at the cost of one attribute: a fused
operator stands for several module calls and must not pass over what is attached to one of them.
Looking into each module's dictionaries of hooks would be a guard each under torch.compile, checked
on every call: for a model of 26 layers that takes longer than the norms.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma_fold import ops
from gemma_fold.engines.mode import requested
from gemma_fold.engines.weights import fold as fold_weight
from gemma_fold.engines.weights import original_weight, unfold
from gemma_fold.errors import UnsupportedModelError
from gemma_fold.format.manifest import FoldedTensor
from gemma_fold.ops import checks
from gemma_fold.ops.operators.rms_norm import reference
from gemma_fold.rules import Fold

#: Names a zero-centred norm gives its gain.
_GAIN_NAMES = ("weight", "gamma")
_EPSILON_NAMES = ("eps", "variance_epsilon")
VARIABLE = "GEMMA_FOLD_COMPILED"
VALUES = ("inline", "operators")
#: Whether a compiler gets norms as operators, with the bits of eager mode. Read once: an attribute
#: of each norm would be a guard each.
AS_OPERATORS = requested(VARIABLE, VALUES) == "operators"


class Watched(nn.Module):
    """A module with an attribute `plain`: its call runs its forward and nothing else.

    Hooks that are removed again leave it false: results do not depend on it.
    """

    plain: bool = True

    def watch(self) -> None:
        """Look once at what is attached already; from then on additions are noticed."""
        self.__dict__["plain"] = not (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or "forward" in self.__dict__
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":  # offloading and output capture replace it on the instance
            self.__dict__["plain"] = False
        super().__setattr__(name, value)


def _noticing(method: str) -> Callable[..., Any]:
    original = getattr(nn.Module, method)

    @wraps(original)
    def register(self: Watched, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["plain"] = False
        return original(self, *args, **kwargs)

    return register


for _name in (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_backward_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
):
    setattr(Watched, _name, _noticing(_name))


class FoldedNorm(Watched):
    """A norm with folded fp32 gain; made by :meth:`adopt`, never constructed.

    Attributes:
        origin: the class this module had before, which :meth:`restore` gives back.
        fold: the arithmetic of its family.
        gain_name: its parameter, fp32 [H, 1] (or [H] while an unlocked checkpoint loads).
        epsilon: added to the mean square or the variance.
        group: columns normed together, or None for all of them.
        is_rms: whether it is an RMSNorm of whole rows that adds in fp32, as nearly all are.
        source: what the manifest says of its gamma, if a checkpoint gave it under that name.
    """

    origin: type[nn.Module]
    fold: Fold
    gain_name: str
    epsilon: float
    group: int | None
    is_rms: bool
    source: FoldedTensor | None = None
    bias: Tensor | None

    @staticmethod
    def adopt(
        module: nn.Module, fold: Fold, *, locked: bool = True, shared: bool = False
    ) -> FoldedNorm:
        """Turn the zero-centred norm `module` into a folded one, in place; returns it.

        A weight on the meta device gives a gamma on the meta device, to be loaded. The parameter
        stays the same object, as optimizers need, unless it is shared.

        Args:
            module: the norm.
            fold: the arithmetic of its family.
            locked: whether gamma has shape [H, 1], else [H].
            shared: whether another module has the parameter too.

        Raises:
            UnsupportedModelError: the norm cannot be folded here.
        """
        name = gain_name(module)
        weight = module._parameters[name]
        assert weight is not None
        sharded = hasattr(weight, "device_mesh") or hasattr(weight, "ds_id")
        if sharded or "forward" in module.__dict__:
            raise UnsupportedModelError(
                f"a {type(module).__name__} was sharded or wrapped, as FSDP, DeepSpeed, offloading "
                "and tensor parallelism do; fold the model before that, or load a folded "
                "checkpoint without tp_plan"
            )
        shape = (*weight.shape, 1) if locked else weight.shape
        if weight.is_meta:
            gamma = torch.empty(shape, dtype=torch.float32, device="meta")
        else:
            with torch.no_grad():
                gamma = fold_weight(weight, fold.offset).reshape(shape)
        module.__dict__.update(
            origin=type(module),
            fold=fold,
            gain_name=name,
            epsilon=_epsilon(module),
            group=getattr(module, "group_size", None),
        )
        # One attribute for forward to ask: under torch.compile each is a guard.
        module.__dict__["is_rms"] = (
            fold.norm == "rms_norm"
            and fold.add_dtype == "float32"
            and module.__dict__["group"] is None
        )
        module._parameters[name] = _with_value(weight, gamma, keep=not shared)
        module.__class__ = FoldedNorm
        assert isinstance(module, FoldedNorm)
        module.watch()
        return module

    def restore(self, dtype: torch.dtype, *, shared: bool = False) -> nn.Module:
        """Undo :meth:`adopt`: the original class, with w = gamma - offset in `dtype`."""
        parameter = self.gain
        with torch.no_grad():
            gamma = parameter.view(-1)
            weight = (
                unfold(gamma, self.fold.offset, dtype)
                if self.source is None
                else original_weight(gamma, self.source).to(dtype)
            )
        self._parameters[self.gain_name] = _with_value(parameter, weight, keep=not shared)
        origin = self.origin
        self.__dict__.pop("source", None)
        for name in ("origin", "fold", "gain_name", "epsilon", "group", "is_rms", "plain"):
            delattr(self, name)
        self.__class__ = origin  # type: ignore[assignment]
        return self

    @property
    def gain(self) -> nn.Parameter:
        """The parameter itself: fp32 [H, 1]; what a parametrization makes of it if there is one."""
        parameter = self._parameters.get(self.gain_name)
        return getattr(self, self.gain_name) if parameter is None else parameter

    def _stored(self) -> list[nn.Parameter]:
        """The parameter, or those that a parametrization makes the gain of."""
        parameter = self._parameters.get(self.gain_name)
        if parameter is not None:
            return [parameter]
        made = self._modules.get("parametrizations")
        if not isinstance(made, nn.ModuleDict) or self.gain_name not in made:
            return []
        return [one for one in made[self.gain_name]._parameters.values() if one is not None]

    def unlock(self) -> None:
        """Give the parameter shape [H], for a raw w that is loaded into it next."""
        gain = self.gain
        raw = gain.detach().reshape(-1)
        self._parameters[self.gain_name] = _with_value(gain, raw, keep=True)

    def fold_raw(self) -> None:
        """Fold a raw w that was loaded into the unlocked parameter, and lock it again."""
        gain = self.gain
        gamma = fold_weight(gain.detach(), self.fold.offset)[:, None]
        self._parameters[self.gain_name] = _with_value(gain, gamma, keep=True)

    def lock(self) -> None:
        """Give a gamma loaded as [H] its [H, 1] shape."""
        old = self.gain
        gamma = old.detach().reshape(-1, 1)
        self._parameters[self.gain_name] = nn.Parameter(gamma, requires_grad=old.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [..., H]. Returns the norm in the dtype of `x`."""
        gamma = self.gain.view(-1)
        if self.is_rms:
            return self._rms_norm(x, gamma)
        if self.fold.norm == "layer_norm":
            gamma, bias = gamma.to(x.dtype), self._parameters.get("bias")
            if self.fold.mul_dtype == "storage":
                return F.layer_norm(x, gamma.shape, None, None, _epsilon(self)) * gamma
            return F.layer_norm(x, gamma.shape, gamma, bias, _epsilon(self))
        if self.fold.add_dtype == "storage":
            # The rounded fp32 sum is the sum in that dtype: torch, too, adds a scalar in fp32 and
            # rounds once.
            gamma = gamma.to(x.dtype).float()
        if self.group is not None:
            return _grouped_rms_norm(x, gamma, self.group, self.epsilon)
        return self._rms_norm(x, gamma)

    def _rms_norm(self, x: Tensor, gamma: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and not AS_OPERATORS:
            # A compiler fuses what it can see with its neighbours, rotary embedding for one.
            return reference(x, gamma, self.epsilon)
        if not checks.supports(x):
            return reference(x, gamma, self.epsilon)
        return ops.rms_norm(x, gamma, self.epsilon)

    def extra_repr(self) -> str:
        return f"{self.gain.shape[0]}, eps={self.epsilon}, folded from {self.origin.__name__}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedNorm:
        # .to(dtype), .half() and the like end here. A 16-bit gamma is not the model's gain any
        # more, so gamma follows the device and keeps its dtype.
        kept = [one for gain in self._stored() for one in (gain, gain.grad)]

        def apply(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if out.dtype == tensor.dtype or not any(tensor is one for one in kept):
                return out
            return tensor.to(out.device)

        return super()._apply(apply, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _EPSILON_NAMES:
            self.__dict__["epsilon"] = float(value)
        elif name == "offset" and value:
            # Liger's patch does this before it binds its own forward, which would add it again.
            raise UnsupportedModelError(
                f"the model is folded, and a kernel that adds {value} to its norm weights would "
                "add it twice; leave its norms out (Liger: rms_norm=False), or unfold_model first"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A raw w, from an original checkpoint, a trainer or an adapter: it has shape [H].
        key = prefix + self.gain_name
        weight = state_dict.get(key)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            state_dict = {**state_dict, key: fold_weight(weight, self.fold.offset)[:, None]}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "transformers" in sys.modules:  # an unpickled model must save itself as format 1
            from gemma_fold.engines.transformers import install

            install()


def _grouped_rms_norm(x: Tensor, gamma: Tensor, group_size: int, eps: float) -> Tensor:
    """RMSNorm of every ``group_size`` columns by themselves, then the gain of all H columns."""
    x32 = x.float().reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    normed: Tensor = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * gamma).to(x.dtype)


def _with_value(parameter: nn.Parameter, value: Tensor, *, keep: bool) -> nn.Parameter:
    """`parameter` with another `value`, shape and dtype; a new one if it cannot be kept.

    An optimizer made before holds the object, and would train nothing if it were another one.
    """
    plain = type(parameter) is nn.Parameter and not (parameter.is_meta or parameter.is_inference())
    if not (keep and plain):
        return nn.Parameter(value, requires_grad=parameter.requires_grad)
    grad, parameter.grad = parameter.grad, None
    parameter.data = value
    if grad is not None:  # d(1 + w)/dw = 1: a gamma has the gradient of its w
        parameter.grad = grad.to(value.dtype).reshape(value.shape)
    return parameter


def gain_name(module: nn.Module) -> str:
    """The name of a zero-centred norm's gain.

    Raises:
        UnsupportedModelError: it has none.
    """
    for name in _GAIN_NAMES:
        if module._parameters.get(name) is not None:
            return name
    raise UnsupportedModelError(
        f"a {type(module).__name__} has neither a weight nor a gamma; "
        "this version of the model is not supported"
    )


def _epsilon(module: nn.Module) -> float:
    for holder in (module, getattr(module, "ln", None)):
        for name in _EPSILON_NAMES:
            value = getattr(holder, name, None)
            if isinstance(value, float):
                return value
    raise UnsupportedModelError(
        f"a {type(module).__name__} has no eps; this version of the model is not supported"
    )
