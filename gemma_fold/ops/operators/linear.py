"""A linear layer of a few tokens: its weight streamed at memory speed, or torch's product."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from gemma_fold.ops import checks, program
from gemma_fold.ops.operators.base import is_transformed, register, runs_eagerly

#: The kernel's sums have room for so many tokens.
MOST_TOKENS = 16
#: Columns that a warp takes at a time.
CHUNK = 128
#: Columns of a program of the kernel that multiplies what others have gated.
GELU_BLOCK = 1024
_SOURCE = "kernels/linear.cu"
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape of the kernel.

    Attributes:
        warps: that share the columns of a block. They fix the order of every sum, so one weight has
            one number of them, whatever the tokens.
        row_tiles: of 8 rows of the weight, in a block.
        stages: chunks of columns on their way to each warp.
    """

    warps: int
    row_tiles: int
    stages: int

    def shared(self, tokens: int) -> int:
        """Bytes of dynamic shared memory of a block."""
        return self.warps * self.stages * (8 * self.row_tiles + tokens) * CHUNK * 2


@cache
def _shapes_on(device: int, gated: bool) -> dict[tuple[int, int], dict[int, Shape]]:
    """Shapes that were faster than torch on such a GPU, by the weight's and by most tokens.

    `python -m benchmarks.linear --tune` writes them.
    """
    text = files("gemma_fold.ops.kernels").joinpath("linear_shapes.json").read_text()
    measured = json.loads(text).get(torch.cuda.get_device_name(device), {})
    return {
        (rows, columns): {tokens: Shape(warps, tiles, stages) for tokens, tiles, stages in steps}
        for rows, columns, warps, steps in measured.get("gelu_linear" if gated else "linear", [])
    }


def most_tokens(weight: Tensor, *, gated: bool = False) -> int:
    """Tokens up to which the kernel was measured to be faster with a weight like this one.

    Args:
        weight: [N, K], of any dtype, on any device.
        gated: asks for :func:`gelu_linear`.

    Returns:
        0 where torch's product runs, whatever the number of tokens.
    """
    if not weight.is_cuda or weight.dtype != torch.bfloat16 or weight.dim() != 2:
        return 0
    if weight.stride(1) != 1 or weight.stride(0) % 8 or weight.data_ptr() % 16:
        return 0
    shapes = _shapes_on(weight.get_device(), gated)
    return max(shapes.get((weight.shape[0], weight.shape[1]), {0: None}))


class _Args(ctypes.Structure):
    """The struct Args of ``linear.cu``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "y")),
        *((name, ctypes.c_int64) for name in ("x_stride", "w_stride")),
        *((name, ctypes.c_int32) for name in ("tokens", "rows", "columns")),
    ]


def defines(shape: Shape, tokens: int, gated: bool) -> dict[str, int]:
    """Macros of ``linear.cu``."""
    return {
        "WARPS": shape.warps,
        "ROW_TILES": shape.row_tiles,
        "STAGES": shape.stages,
        "CHUNK": CHUNK,
        "MANY": int(tokens > 8),
        "GATED": int(gated),
    }


class _Plan:
    """A kernel for so many tokens."""

    def __init__(self, device: int, shape: Shape, tokens: int, gated: bool) -> None:
        self._device = device
        self._rows = 8 * shape.row_tiles
        self._halves = 2 if gated else 1
        self._kernel = program.load(
            device,
            _SOURCE,
            "linear",
            defines(shape, tokens, gated),
            shape.warps * 32,
            shape.shared(tokens),
        )

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` [tokens, K], its rows contiguous and aligned to 16 bytes."""
        rows, columns = weight.shape
        y = x.new_empty((x.shape[0], rows // self._halves))
        args = _Args(
            x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.stride(0), weight.stride(0),
            x.shape[0], rows, columns,
        )  # fmt: skip
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        blocks = -(-rows // self._rows)
        with torch.cuda.device(self._device):
            stream = _current_stream(self._device)
            self._kernel.launch(blocks, ctypes.addressof(pointers), stream)
        return y


_plans: dict[tuple[int, Shape, int, bool], _Plan] = {}


def run_shape(x: Tensor, weight: Tensor, shape: Shape, *, gated: bool = False) -> Tensor:
    """The kernel in one of its shapes: for ``x`` [tokens, K], 1 to 16 tokens, K a multiple of 128.

    Raises:
        ProgramError: it does not compile or does not fit this GPU.
    """
    key = (x.get_device(), shape, x.shape[0], gated)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _Plan(*key)
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return plan.run(x, weight)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` as torch has it."""
    return torch.nn.functional.linear(x, weight)


def gelu_reference(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`reference`, rounded, and then :func:`gelu_mul_reference`."""
    return gelu_mul_reference(reference(x, weight))


def gelu_mul_reference(x: Tensor) -> Tensor:
    """``gelu(gate) * up`` of the halves of ``x`` [..., 2 I], in fp32, rounded once: [..., I]."""
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(x.dtype)


def gelu_mul(x: Tensor) -> Tensor:
    """:func:`gelu_mul_reference` in one launch, where a kernel runs."""
    if checks.reference_runs(x):
        return gelu_mul_reference(x)
    from gemma_fold.ops.kernels.gelu_mul import gelu_mul_kernel

    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    if y.numel():
        grid = (y.numel() // y.shape[-1], -(-y.shape[-1] // GELU_BLOCK))
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            gelu_mul_kernel[grid](x, y, y.shape[-1], BLOCK=GELU_BLOCK)
    return y


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], not {list(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} must end in the K of weight {list(weight.shape)}")
    if x.dtype != weight.dtype:
        raise TypeError(f"x ({x.dtype}) and weight ({weight.dtype}) must have the same dtype")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} but weight is on {weight.device}")


def _streamed(x: Tensor, weight: Tensor, gated: bool) -> Tensor | None:
    """By the kernel, where that was measured to be faster."""
    tokens = x.numel() // max(1, x.shape[-1])
    if not 0 < tokens <= MOST_TOKENS or tokens > most_tokens(weight, gated=gated):
        return None
    steps = _shapes_on(weight.get_device(), gated)[weight.shape[0], weight.shape[1]]
    shape = steps[min(most for most in steps if most >= tokens)]
    y = run_shape(x.reshape(tokens, -1), weight, shape, gated=gated)
    return y.view(*x.shape[:-1], -1)


class _Product:
    """An operator of ``x`` and one weight: how a call of it runs.

    Args:
        name: in ``torch.ops.gemma_fold``.
        gated: half of the rows of the weight are gates.
        reference: what it computes; torch differentiates that.
    """

    def __init__(
        self, name: str, gated: bool, reference: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self._gated = gated
        self._reference = reference
        self._traced = register(name, ["Tensor x", "Tensor weight"], 1, self._run, self._fake)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if runs_eagerly(x, (x, weight)):
            return self._run(x, weight)
        trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if trained or is_transformed():
            self._check(x, weight)
            return self._reference(x, weight)
        return self._traced(x, weight)  # type: ignore[no-any-return]

    def _run(self, x: Tensor, weight: Tensor) -> Tensor:
        self._check(x, weight)
        y = _streamed(x, weight, self._gated)
        if y is None and self._gated:
            return gelu_mul(_linear._run(x, weight))
        return reference(x, weight) if y is None else y

    def _fake(self, x: Tensor, weight: Tensor) -> Tensor:
        self._check(x, weight)
        return x.new_empty((*x.shape[:-1], weight.shape[0] // (1 + self._gated)))

    def _check(self, x: Tensor, weight: Tensor) -> None:
        _check(x, weight)
        if self._gated and weight.shape[0] % 2:
            raise ValueError(f"weight {list(weight.shape)} must have as many gates as other rows")


_linear = _Product("linear", False, reference)
_gelu_linear = _Product("gelu_linear", True, gelu_reference)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T``, faster than torch's product where a few tokens meet a large bf16 weight.

    Up to 16 tokens, on GPUs and for weights for which that was measured
    (``gemma_fold/ops/kernels/linear_shapes.json``), a kernel of its own streams the weight once;
    everything else is ``torch.nn.functional.linear``. The kernel adds in fp32 and rounds once, and
    gives a row the same bits however many rows it is called with.

    Like the norms, the kernel may start while the one before it still runs, and then reads
    ``weight`` at once: what writes a weight must not signal its dependents before it ends.

    Args:
        x: [..., K], bf16 for the kernel.
        weight: [N, K], dtype of ``x``.

    Returns:
        [..., N], dtype of ``x``.

    Raises:
        TypeError: the dtypes differ.
        ValueError: the shapes do not fit, or the devices differ.
    """
    return _linear(x, weight)


def gelu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The first half of a gated feed-forward block: ``gelu(x G^T) * (x U^T)``, with tanh GELU.

    As :func:`linear`; where its kernel runs, gates and what they scale never leave the GPU's
    registers. The products round to the dtype of ``x``, GELU and its product once more.

    Args:
        x: [..., K], bf16 for the kernel.
        weight: [2 I, K], dtype of ``x``: the gates G, then U.

    Returns:
        [..., I], dtype of ``x``. It raises what ``linear`` raises.
    """
    return _gelu_linear(x, weight)
