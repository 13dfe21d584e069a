"""Modules that know whether anything is attached to them, at the cost of one attribute.

A fused operator stands for several module calls and must not pass over what is attached to one of
them. Looking into each module's dictionaries of hooks would be a guard each under torch.compile,
checked on every call: for a model of 26 layers that takes longer than the norms.
"""

from __future__ import annotations

from typing import Any

from torch import nn


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

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["plain"] = False
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["plain"] = False
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["plain"] = False
        return super().register_backward_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["plain"] = False
        return super().register_full_backward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["plain"] = False
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":  # offloading and output capture replace it on the instance
            self.__dict__["plain"] = False
        super().__setattr__(name, value)
