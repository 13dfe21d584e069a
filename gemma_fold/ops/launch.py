"""Starts the Triton kernels: one compilation, then launches with little host work.

Triton inspects every argument on every call to find the right specialisation, which takes longer
than a small norm runs. A :class:`Plan` holds what a call with given shapes and strides needs, so
that a second such call hands plain addresses to the compiled kernel. That goes past Triton's public
interface, so it is done with versions that are known to take it; others launch as Triton documents,
the same kernel with more host time.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from gemma_fold.ops.checks import row_stride, row_strides, token_stride
from gemma_fold.ops.kernels.add_rms_norm import add_rms_norm_kernel
from gemma_fold.ops.kernels.qk_rms_norm import qk_rms_norm_kernel
from gemma_fold.ops.kernels.qk_rms_norm_rope import qk_rms_norm_rope_kernel
from gemma_fold.ops.kernels.rms_norm import rms_norm_kernel
from gemma_fold.ops.kernels.rms_norm_add_rms_norm import rms_norm_add_rms_norm_kernel
from gemma_fold.ops.kernels.rms_norm_backward import rms_norm_backward_kernel
from gemma_fold.ops.kernels.rows import AT_END, EARLY, NO_PDL
from gemma_fold.ops.tuning import heads_config, row_config

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: The first and the last version of Triton whose launcher was read; 3.6 is what was measured.
_DIRECT_VERSIONS = (3, 6), (3, 9)
#: What its launchers take before the kernel's arguments: the second spells out four of the first.
_LAUNCHERS = (
    ["gridX", "gridY", "gridZ", "stream", "function", "*args"],
    [
        *("gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata", "launch_metadata"),
        *("launch_enter_hook", "launch_exit_hook", "*args"),
    ],
)
MAX_ROWS = 2**31 - 1  # the row number is a 32-bit program id
_BACKWARD_PROGRAMS_PER_SM = 4
# Absent from builds without CUDA, where nothing asks for them.
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@cache
def _uses_pdl(device: int) -> bool:
    """Programmatic dependent launch exists on NVIDIA from compute capability 9.0."""
    if INTERPRETED or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


@cache
def takes_addresses(launcher: Any, version: str) -> bool:
    """Whether this class of launcher, of Triton `version`, is called as :class:`Plan` calls it."""
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    first, last = _DIRECT_VERSIONS
    if not first <= number <= last:
        return False
    try:
        _, *parameters = inspect.signature(launcher.__call__).parameters.values()
    except (TypeError, ValueError):
        return False
    return [str(parameter) for parameter in parameters] in _LAUNCHERS


class Plan:
    """One kernel for one set of shapes and strides: its grid, strides and compiled form."""

    __slots__ = (
        "constants",
        "dense",
        "device",
        "kernel",
        "options",
        "programs",
        "ready",
        "scalars",
    )

    def __init__(
        self,
        kernel: Any,
        x: Tensor,
        programs: int,
        scalars: tuple[int, ...],
        constants: dict[str, Any],
        warps: int,
    ) -> None:
        self.kernel = kernel
        self.dense = x.is_contiguous()
        self.device = -1 if INTERPRETED else x.get_device()
        self.programs = programs
        self.scalars = scalars
        self.constants = constants
        # In fp32 a fused multiply-add would skip the rounding between a norm and the add after it.
        self.options = {"num_warps": warps, "enable_fp_fusion": x.dtype != torch.float32}
        if constants.get("PDL") and not _uses_pdl(self.device):
            constants["PDL"] = NO_PDL.value
        elif constants.get("PDL") and x.dtype == torch.float32:
            constants["PDL"] = AT_END.value  # what it writes could be the next kernel's gamma
        if constants.get("PDL"):
            self.options["launch_pdl"] = True  # an option that only NVIDIA's backend knows
        self.ready: tuple[Any, ...] | None = None

    def __call__(self, tensors: Sequence[Tensor | None], eps: tuple[float, ...]) -> None:
        """Launches on the current stream. ``tensors`` in the kernel's order."""
        if self.programs == 0:
            return
        if self.ready is None or self.device != _current_device():
            self._launch_through_triton(tensors, eps)
            return
        addresses = []
        bits = 0
        for tensor in tensors:
            address = None if tensor is None else tensor.data_ptr()
            addresses.append(address)
            bits |= address or 0
        if bits & 15:
            # The compiled kernel uses 16-byte accesses: Triton finds or builds another.
            self._launch_through_triton(tensors, eps)
            return
        run, function, metadata, values = self.ready
        stream = _current_stream(self.device)
        run(
            self.programs, 1, 1, stream, function, metadata, None, None, None,
            *addresses, *self.scalars, *eps, *values,
        )  # fmt: skip

    def _launch_through_triton(
        self, tensors: Sequence[Tensor | None], eps: tuple[float, ...]
    ) -> None:
        launch = self.kernel[(self.programs,)]
        if INTERPRETED:
            launch(*tensors, *self.scalars, *eps, **self.constants)
            return
        with torch.cuda.device(self.device):
            compiled = launch(*tensors, *self.scalars, *eps, **self.constants, **self.options)
        run = compiled.run
        if not takes_addresses(run.__class__, triton.__version__):
            return
        if all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors):
            self.ready = (
                run,
                compiled.function,
                compiled.packed_metadata,
                tuple(self.constants.values()),
            )


def _steps(x: Tensor, strides: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Strides as multiples of a unit: the elements in 16 bytes, where all of them allow it.

    ``step * UNIT`` shows the compiler that rows keep 16-byte alignment.
    """
    vector = 16 // x.element_size()
    for stride in strides:
        if stride % vector:
            return 1, strides
    return vector, tuple(stride // vector for stride in strides)


def _row_count(elements: int, hidden: int) -> int:
    rows = elements // hidden
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows; at most {MAX_ROWS} are supported")
    return rows


def _plan_rows(
    kernel: Any,
    name: str,
    x: Tensor,
    strides: tuple[int, ...],
    fp8: str | None,
    heads: tuple[int, int] | None = None,
) -> Plan:
    """``heads``: their number and stride, for a kernel that takes them."""
    hidden, itemsize = x.shape[-1], x.element_size()
    rows = _row_count(x.numel(), hidden)
    unit, steps = _steps(x, strides if heads is None else (*strides, heads[1]))
    config = row_config(name, fp8 is not None, hidden * itemsize, rows)
    constants = {
        "UNIT": unit,
        "H": hidden,
        "CHUNK": config.warps * 32 * (16 // itemsize),
        "M": config.together,
        "PER_TOKEN": fp8 == "per_token",
        "NVIDIA": not INTERPRETED and torch.version.hip is None,
        "PDL": config.pdl,
        "FENCE": config.fence,
        "GAMMA": config.gamma,
        "STORE": config.store,
    }
    if heads is not None:
        constants |= {"HEADS": heads[0], "HEAD_STEP": steps[-1]}
        steps = steps[:-1]
    programs = -(-rows // config.together)
    return Plan(kernel, x, programs, (rows, *steps), constants, config.warps * config.together)


def plan_rms_norm(x: Tensor, fp8: str | None = None) -> Plan:
    """Called with ``(x, gamma, y, scale), (eps,)``."""
    stride, heads, head_stride = row_strides(x, "x")
    return _plan_rows(rms_norm_kernel, "rms_norm", x, (stride,), fp8, (heads, head_stride))


def plan_add_rms_norm(x: Tensor, residual: Tensor, fp8: str | None = None) -> Plan:
    """Called with ``(x, residual, gamma, y, total, scale), (eps,)``."""
    strides = (row_stride(x, "x"), row_stride(residual, "residual"))
    return _plan_rows(add_rms_norm_kernel, "add_rms_norm", x, strides, fp8)


def plan_rms_norm_add_rms_norm(x: Tensor, residual: Tensor, fp8: str | None = None) -> Plan:
    """Called with ``(x, residual, post_gamma, pre_gamma, y, total, scale), (post, pre)`` eps."""
    strides = (row_stride(x, "x"), row_stride(residual, "residual"))
    return _plan_rows(rms_norm_add_rms_norm_kernel, "rms_norm_add_rms_norm", x, strides, fp8)


def _plan_heads(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    in_place: bool,
    scalars: tuple[int, ...] = (),
    extra: dict[str, Any] | None = None,
) -> Plan:
    """A kernel over heads of ``q`` and ``k``, all of them in one numbering of rows."""
    hidden, itemsize = q.shape[-1], q.element_size()
    rows = _row_count(q.numel() + k.numel(), hidden)
    strides = (token_stride(q, "q"), token_stride(k, "k"), q.stride(-2), k.stride(-2))
    dense = (q.shape[-2] * hidden, k.shape[-2] * hidden, hidden, hidden)
    unit, steps = _steps(q, strides + (strides if in_place else dense))
    block = max(triton.next_power_of_2(hidden), 16 // itemsize)
    config = heads_config(block * itemsize, rows)
    constants = {
        "UNIT": unit,
        "Q_HEADS": q.shape[-2],
        "K_HEADS": k.shape[-2],
        "H": hidden,
        "BLOCK": block,
        "M": config.together,
        "PDL": EARLY.value,
        "IN_PLACE": in_place,
        **(extra or {}),
    }
    programs = -(-rows // config.together)
    return Plan(kernel, q, programs, (rows, *steps, *scalars), constants, config.warps)


def plan_qk_rms_norm(q: Tensor, k: Tensor, in_place: bool) -> Plan:
    """Called with ``(q, k, q_out, k_out, q_gamma, k_gamma), (eps,)``; outputs dense or in place."""
    return _plan_heads(qk_rms_norm_kernel, q, k, in_place)


def plan_qk_rms_norm_rope(
    q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool, in_place: bool
) -> Plan:
    """Called as :func:`plan_qk_rms_norm`'s, with ``cos_sin`` and ``positions`` after the gammas."""
    unit, steps = _steps(cos_sin, (row_stride(cos_sin, "cos_sin"),))
    extra = {
        "COS_SIN_UNIT": unit,
        "H2": cos_sin.shape[-1] // 2,
        "NVIDIA": not INTERPRETED and torch.version.hip is None,
        "INTERLEAVED": interleaved,
    }
    scalars = (*steps, cos_sin.numel() // cos_sin.shape[-1])
    return _plan_heads(qk_rms_norm_rope_kernel, q, k, in_place, scalars, extra)


def plan_rms_norm_backward(x: Tensor, grad: Tensor) -> Plan:
    """Called with ``(grad, x, gamma, dx, partial), (eps,)``; ``partial``: fp32 [programs, H]."""
    hidden = x.shape[-1]
    rows = _row_count(x.numel(), hidden)
    unit, steps = _steps(x, (row_stride(x, "x"), row_stride(grad, "grad")))
    block = triton.next_power_of_2(hidden)
    constants = {"UNIT": unit, "H": hidden, "BLOCK": block}
    at_once = 4
    if not INTERPRETED:
        properties = torch.cuda.get_device_properties(x.device)
        at_once = properties.multi_processor_count * _BACKWARD_PROGRAMS_PER_SM
    programs = min(rows, at_once)
    warps = min(16, max(1, block // 512))
    return Plan(rms_norm_backward_kernel, x, programs, (rows, *steps), constants, warps)
