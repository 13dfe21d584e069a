"""Starts the Triton kernels: one compilation, then launches with little host work.

Triton inspects every argument on every call to find the right specialisation, which takes longer
than a small norm runs. A :class:`Plan` holds what a call with given shapes and strides needs, so
that a second such call hands plain addresses to the compiled kernel. That goes past Triton's public
interface, so it is done with versions that are known to take it; others launch as Triton documents,
the same kernel with more host time.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from gemma_fold.ops.checks import INTERPRETED, row_stride, row_strides, token_stride
from gemma_fold.ops.kernels.rows import AT_END, EARLY, FIRST, LAST, LATE, NO_PDL, WITH_ROWS

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

# Which shape of kernel runs is measured once and never searched for at run time. Figures are from
# H100s (benchmarks/norms.py times the result). How many warps share a row fixes the order of its
# sum, so it depends on the row alone; what depends on the number of rows changes no bit. Programs
# that keep gamma in registers and take one row after another, with loads pipelined through shared
# memory or not, were slower than one program a row wherever tried (1024, 4096 and 16384 rows).

# (largest row in bytes, warps), in ascending order. One table for all operators, so that a fused
# operator sums in the order of the operators it replaces and equals them bit for bit.
_WARPS = ((2560, 1), (8192, 4), (16384, 8))
_MOST_WARPS = 16
#: Rows up to which every program has an SM to itself, whose L2 traffic it need not share.
LONE_ROWS = 128
#: Rows at which the programs of one kernel no longer fit on the GPU all at once.
MANY_ROWS = 512
# Rows from which short ones fill the GPU several times over.
_CROWDED_ROWS = 1024
# Bytes of all heads above which a program takes twice as many.
_MANY_HEAD_BYTES = 2 << 20

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


def on_nvidia() -> bool:
    """Whether kernels are compiled for NVIDIA: neither for ROCm nor interpreted."""
    return not INTERPRETED and torch.version.hip is None


def steps(x: Tensor, strides: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Strides as multiples of a unit: the elements in 16 bytes, where all of them allow it.

    ``step * UNIT`` shows the compiler that rows keep 16-byte alignment.
    """
    vector = 16 // x.element_size()
    for stride in strides:
        if stride % vector:
            return 1, strides
    return vector, tuple(stride // vector for stride in strides)


def row_size(*tensors: Tensor) -> tuple[int, int]:
    """How many rows the tensors have together, and the bytes of a row.

    Raises ValueError for more rows than a kernel can number.
    """
    x = tensors[0]
    rows = sum(tensor.numel() for tensor in tensors) // x.shape[-1]
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows; at most {MAX_ROWS} are supported")
    return rows, x.shape[-1] * x.element_size()


@cache
def warps_per_row(row_bytes: int) -> int:
    """Warps that share one row of ``row_bytes`` bytes of activations."""
    for limit, warps in _WARPS:
        if row_bytes <= limit:
            return warps
    return _MOST_WARPS


def _signals_late(fp8: bool, row_bytes: int, rows: int) -> bool:
    """Whether the next kernel starts late. A queue of early ones would crowd onto a few SMs."""
    if warps_per_row(row_bytes) == 1:
        return fp8 and rows > 64
    if rows <= LONE_ROWS:
        return row_bytes > 8192 or rows > 16
    return fp8 and rows <= 2 * LONE_ROWS and row_bytes <= 8192


def plan_rows(
    kernel: Any,
    x: Tensor,
    residual: Tensor | None,
    fp8: str | None,
    *,
    crowded: int | None = None,
    pair: bool = False,
    late: bool = False,
    late_gamma: bool = False,
    fence: bool = True,
) -> Plan:
    """The plan of a kernel over rows; one without a residual takes heads of a wider tensor, too.

    fp8: "static" or "per_token" for e4m3 output. crowded: short rows in one program where they fill
    the GPU several times over. pair: a program takes two rows elsewhere. late: the next kernel
    starts late, also where others let it start early. late_gamma: gamma is loaded when it is
    needed, not with the rows. fence: all loads are issued before any arithmetic.
    """
    rows, row_bytes = row_size(x)
    warps = warps_per_row(row_bytes)
    together = 2 if pair else 1
    if row_bytes % 16:
        together = 1  # rows that miss 16-byte alignment are laid out by how many share a program
    elif rows > _CROWDED_ROWS and warps == 1:
        together = crowded or (4 if row_bytes <= 1536 and not fp8 else 1)
    of_heads = {}
    if residual is None:
        stride, heads, head_stride = row_strides(x, "x")
        unit, (*taken, head_step) = steps(x, (stride, head_stride))
        of_heads = {"HEADS": heads, "HEAD_STEP": head_step}
    else:
        strides = row_stride(x, "x"), row_stride(residual, "residual")
        unit, (*taken,) = steps(x, strides)
    late = late or _signals_late(fp8 is not None, row_bytes, rows)
    gamma = FIRST if rows <= LONE_ROWS else LAST if late_gamma else WITH_ROWS
    constants = {
        "UNIT": unit,
        "H": x.shape[-1],
        "CHUNK": warps * 32 * (16 // x.element_size()),
        "M": together,
        "PER_TOKEN": fp8 == "per_token",
        "NVIDIA": on_nvidia(),
        "PDL": LATE.value if late else EARLY.value,
        "FENCE": fence and not (together > 1 and rows <= 2 * LONE_ROWS),
        "GAMMA": gamma.value,
        "STORE": ".cg" if rows > MANY_ROWS and row_bytes > 2048 else "",
        **of_heads,
    }
    programs = -(-rows // together)
    return Plan(kernel, x, programs, (rows, *taken), constants, warps * together)


def plan_heads(
    kernel: Any,
    heads: Sequence[Tensor],
    in_place: bool,
    scalars: tuple[int, ...] = (),
    extra: dict[str, Any] | None = None,
    *,
    written: int = 2,
) -> Plan:
    """The plan of a kernel over the heads of q, k and perhaps v, all in one numbering of rows.

    The kernel takes the strides of tokens and then those of heads, of ``heads``, and again of the
    outputs of the first ``written`` of them: in place, or dense.
    """
    q, k = heads[0], heads[1]
    hidden, itemsize = q.shape[-1], q.element_size()
    rows, _ = row_size(*heads)
    outputs = heads[:written]
    dense = [x.shape[-2] * hidden for x in outputs] + [hidden] * written
    out = _head_strides(outputs) if in_place else dense
    unit, taken = steps(q, (*_head_strides(heads), *out))
    block = max(triton.next_power_of_2(hidden), 16 // itemsize)
    # 16 bytes a thread; larger programs where there are enough of them.
    warps = 8 if rows * block * itemsize > _MANY_HEAD_BYTES else 4
    warps = min(16, max(warps, block * itemsize // 512))
    together = max(1, warps * 512 // (block * itemsize))
    constants = {
        "UNIT": unit,
        "Q_HEADS": q.shape[-2],
        "K_HEADS": k.shape[-2],
        "H": hidden,
        "BLOCK": block,
        "M": together,
        "PDL": EARLY.value,
        "IN_PLACE": in_place,
        **(extra or {}),
    }
    programs = -(-rows // together)
    return Plan(kernel, q, programs, (rows, *taken, *scalars), constants, warps)


def _head_strides(heads: Sequence[Tensor]) -> list[int]:
    """From token to token of each, then from head to head of each."""
    tokens = [token_stride(x, name) for name, x in zip("qkv", heads, strict=False)]
    return tokens + [x.stride(-2) for x in heads]
