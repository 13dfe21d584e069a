"""Whether a call may go around torch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Bound once: these run on every call, and a small norm is over in a few microseconds.
_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack


def runs_eagerly(x: Tensor) -> bool:
    """Whether nothing watches this call: no tracing, no dispatch mode, no function transform,
    no forward-mode differentiation.

    Only then may the dispatcher be skipped; it costs several microseconds of host time a call.
    """
    return (
        not _compiling()
        and (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and _dispatch_modes() == 0
        and _transforms() is None
        and forward_ad._current_level < 0
    )


def is_transformed() -> bool:
    """Whether a function transform or forward-mode differentiation may see this call.

    Torch gives operators no tangents, batching rules or higher derivatives of their own: such calls
    run the plain composition, which has them all. torch.compile cannot ask for transforms; it stops
    at those that differentiate backward, and traces the level of forward-mode differentiation.
    """
    return forward_ad._current_level >= 0 or (not _compiling() and _transforms() is not None)
