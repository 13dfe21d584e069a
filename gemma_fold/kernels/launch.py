"""Starts the Triton kernels: chooses a configuration, compiles once, launches with little host work.

Triton inspects every argument on every call to find the right specialisation, which takes longer
than a small norm runs. Here a kernel is looked up by the few facts it was specialised on, and the
compiled one is called with plain addresses. Tensors that are not 16-byte aligned take Triton's own
path, which is slower and checks everything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from gemma_fold.kernels.add_rms_norm import add_rms_norm_kernel
from gemma_fold.kernels.layout import row_stride, token_stride
from gemma_fold.kernels.qk_rms_norm import qk_rms_norm_kernel
from gemma_fold.kernels.rms_norm import rms_norm_kernel
from gemma_fold.kernels.rms_norm_add_rms_norm import rms_norm_add_rms_norm_kernel
from gemma_fold.kernels.rms_norm_backward import rms_norm_backward_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_ROWS = 2**31 - 1  # the row number is a 32-bit program id
_BACKWARD_PROGRAMS_PER_SM = 4

_compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}


@cache
def _uses_pdl(device: int) -> bool:
    """Programmatic dependent launch exists on NVIDIA from compute capability 9.0."""
    if INTERPRETED or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


@cache
def _sm_count(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def warps_per_row(hidden: int, itemsize: int) -> int:
    """Measured on an H200 (benchmarks/norms.py); depends on the row alone, so bits cannot change
    with the batch."""
    for warps, limit in ((1, 1024), (4, 2560), (8, 8192)):
        if hidden * itemsize <= 2 * limit:
            return warps
    return 16


def rows_per_program(warps: int, rows: int) -> int:
    """Short rows share a program once there are enough of them to fill the GPU."""
    return max(1, 4 // warps) if rows > 256 else 1


def _replay(
    key: tuple[Any, ...],
    device: int,
    programs: int,
    tensors: Sequence[Tensor | None],
    scalars: tuple[Any, ...],
) -> bool:
    """Launches the kernel already compiled for ``key``; False where there is none to launch."""
    ready = _compiled.get(key)
    if ready is None or device != torch._C._cuda_getDevice():
        return False
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    for address in addresses:
        if address is not None and address & 15:
            return False
    run, function, metadata, values = ready
    stream = torch._C._cuda_getCurrentRawStream(device)
    run(programs, 1, 1, stream, function, metadata, None, None, None, *addresses, *scalars, *values)
    return True


def _compile(
    kernel: Any,
    key: tuple[Any, ...],
    programs: int,
    tensors: Sequence[Tensor | None],
    scalars: tuple[Any, ...],
    constants: dict[str, Any],
    warps: int,
) -> None:
    """Launches through Triton, and remembers the compiled kernel where it may be replayed."""
    x = tensors[0]
    assert x is not None
    if INTERPRETED:
        kernel[(programs,)](*tensors, *scalars, **constants)
        return
    options: dict[str, Any] = {"num_warps": warps}
    # In fp32 a fused multiply-add would skip the rounding between a norm and the add after it.
    options["enable_fp_fusion"] = x.dtype != torch.float32
    if constants.get("PDL"):
        options["launch_pdl"] = True
    with torch.cuda.device(x.device):
        compiled = kernel[(programs,)](*tensors, *scalars, **constants, **options)
    if all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors):
        _compiled[key] = (
            compiled.run,
            compiled.function,
            compiled.packed_metadata,
            tuple(constants.values()),
        )


def _steps(x: Tensor, strides: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Row strides as multiples of a unit: the elements in 16 bytes where all of them allow it.

    ``step * UNIT`` shows the compiler that rows keep 16-byte alignment.
    """
    vector = 16 // x.element_size()
    for stride in strides:
        if stride % vector:
            return 1, strides
    return vector, tuple(stride // vector for stride in strides)


def _device(x: Tensor) -> int:
    return -1 if INTERPRETED else x.get_device()


def _launch_rows(
    kernel: Any,
    name: str,
    tensors: Sequence[Tensor | None],
    strides: tuple[int, ...],
    eps: tuple[float, ...],
    per_token: bool,
) -> None:
    x = tensors[0]
    assert x is not None
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    if rows == 0:
        return
    if rows > MAX_ROWS:
        raise ValueError(f"x has {rows} rows; at most {MAX_ROWS} are supported")
    itemsize = x.element_size()
    unit, steps = _steps(x, strides)
    warps = warps_per_row(hidden, itemsize)
    together = rows_per_program(warps, rows)
    device = _device(x)
    fp8 = tensors[-1] is not None
    key = (name, device, x.dtype, hidden, unit, together, fp8, per_token)
    programs = -(-rows // together)
    scalars = (rows, *steps, *eps)
    if _replay(key, device, programs, tensors, scalars):
        return
    constants = {
        "UNIT": unit,
        "H": hidden,
        "CHUNK": warps * 32 * (16 // itemsize),
        "M": together,
        "PER_TOKEN": per_token,
        "PDL": _uses_pdl(device),
    }
    _compile(kernel, key, programs, tensors, scalars, constants, warps * together)


def rms_norm(
    x: Tensor, gamma: Tensor, eps: float, y: Tensor, scale: Tensor | None, per_token: bool
) -> None:
    """Fills ``y`` (and per-token ``scale``)."""
    _launch_rows(
        rms_norm_kernel,
        "rms_norm",
        (x, gamma, y, scale),
        (row_stride(x, "x"),),
        (eps,),
        per_token,
    )


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor,
    eps: float,
    y: Tensor,
    total: Tensor,
    scale: Tensor | None,
    per_token: bool,
) -> None:
    """Fills ``y`` and ``total`` (and per-token ``scale``)."""
    _launch_rows(
        add_rms_norm_kernel,
        "add_rms_norm",
        (x, residual, gamma, y, total, scale),
        (row_stride(x, "x"), row_stride(residual, "residual")),
        (eps,),
        per_token,
    )


def rms_norm_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    post_gamma: Tensor,
    pre_gamma: Tensor,
    post_eps: float,
    pre_eps: float,
    y: Tensor,
    total: Tensor,
    scale: Tensor | None,
    per_token: bool,
) -> None:
    """Fills ``y`` and ``total`` (and per-token ``scale``)."""
    _launch_rows(
        rms_norm_add_rms_norm_kernel,
        "rms_norm_add_rms_norm",
        (x, residual, post_gamma, pre_gamma, y, total, scale),
        (row_stride(x, "x"), row_stride(residual, "residual")),
        (post_eps, pre_eps),
        per_token,
    )


def qk_rms_norm(q: Tensor, k: Tensor, q_gamma: Tensor, k_gamma: Tensor, eps: float) -> None:
    """Norms the heads of ``q`` and ``k`` in place."""
    hidden = q.shape[-1]
    q_heads, k_heads = q.shape[-2], k.shape[-2]
    rows = (q.numel() + k.numel()) // hidden
    if rows == 0:
        return
    if rows > MAX_ROWS:
        raise ValueError(f"q and k have {rows} heads; at most {MAX_ROWS} are supported")
    strides = (
        token_stride(q, "q"),
        token_stride(k, "k"),
        q.stride(-2),
        k.stride(-2),
    )
    unit, steps = _steps(q, strides)
    device = _device(q)
    block = max(triton.next_power_of_2(hidden), 16 // q.element_size())
    # 64 bytes a thread, 4 warps: enough in flight, and still several programs for one token.
    together = max(1, 4096 // (block * q.element_size()))
    key = ("qk_rms_norm", device, q.dtype, hidden, unit, q_heads, k_heads)
    programs = -(-rows // together)
    scalars = (rows, *steps, eps)
    tensors = (q, k, q_gamma, k_gamma)
    if _replay(key, device, programs, tensors, scalars):
        return
    constants = {
        "UNIT": unit,
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "H": hidden,
        "BLOCK": block,
        "M": together,
        "PDL": _uses_pdl(device),
    }
    warps = min(16, max(4, block * q.element_size() // 1024))
    _compile(qk_rms_norm_kernel, key, programs, tensors, scalars, constants, warps)


def rms_norm_backward(
    grad: Tensor, x: Tensor, gamma: Tensor, eps: float, dx: Tensor
) -> Tensor:
    """Fills ``dx`` and returns dgamma, fp32 [H]."""
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    device = _device(x)
    limit = 4 if INTERPRETED else _sm_count(device) * _BACKWARD_PROGRAMS_PER_SM
    programs = min(rows, limit)
    partial = x.new_empty((programs, hidden), dtype=torch.float32)
    if rows:
        unit, steps = _steps(x, (row_stride(x, "x"), row_stride(grad, "grad")))
        key = ("rms_norm_backward", device, x.dtype, hidden, unit)
        scalars = (rows, *steps, eps)
        tensors = (grad, x, gamma, dx, partial)
        if not _replay(key, device, programs, tensors, scalars):
            block = triton.next_power_of_2(hidden)
            constants = {"UNIT": unit, "H": hidden, "BLOCK": block}
            warps = min(16, max(1, block // 512))
            _compile(
                rms_norm_backward_kernel, key, programs, tensors, scalars, constants, warps
            )
    return partial.sum(0)
