"""Whether a call may go around torch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor

# Bound once: these run on every call, and a small norm is over in a few microseconds.
_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack


def runs_eagerly(x: Tensor) -> bool:
    """Whether nothing watches this call: no tracing, no dispatch mode, no function transform.

    Only then may the dispatcher be skipped; it costs several microseconds of host time a call.
    """
    return (
        not _compiling()
        and (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and _dispatch_modes() == 0
        and _transforms() is None
    )
