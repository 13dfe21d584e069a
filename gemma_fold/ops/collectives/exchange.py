"""The fused all-reduce of one process group: its peer-mapped buffer, and kernel launches.

The protocol stands at the top of ``kernel.cu``. What a row finds in the buffer depends on how often
that row was used, which all ranks count alike as long as they make the same calls in the same
order, as they must for any collective. Graph replays count on the device like eager calls do.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_fold.ops import program
from gemma_fold.ops.checks import row_stride
from gemma_fold.ops.collectives import tuning

Rows = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # x, y, residual and total, [rows, H]
Gammas = tuple[Tensor | None, Tensor | None]  # fp32 [H] of the post-norm and the pre-norm
Eps = tuple[float, float]

SOURCE = "collectives/kernel.cu"
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_WORDS = {2: torch.int16, 4: torch.int32}
_FP8_MODES = {None: 0, "static": 1, "per_token": 2}
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@dataclass(frozen=True, slots=True)
class Capacity:
    """Rows a workspace holds, by protocol, and the bytes of its buffer on each rank."""

    one_shot_rows: int
    two_shot_rows: int
    pitch: int  # bytes of the longest row
    world: int

    @property
    def one_shot_bytes(self) -> int:
        return 2 * (self.world - 1) * self.one_shot_rows * self.pitch

    @property
    def bytes(self) -> int:
        owned = -(-self.two_shot_rows // self.world)
        two_shot = 2 * (self.world - 1) * owned + 2 * self.two_shot_rows
        return self.one_shot_bytes + two_shot * self.pitch


def capacity(world: int, max_tokens: int, pitch: int, one_shot_bytes: int) -> Capacity:
    """How a workspace for ``max_tokens`` rows of ``pitch`` bytes is laid out."""
    in_one = min(max_tokens, max(1, tuning.ONE_SHOT_KERNEL_BYTES // pitch))
    in_two = min(max_tokens, max(1, tuning.TWO_SHOT_KERNEL_BYTES // pitch))
    one_shot = min(in_one, max(1, one_shot_bytes // pitch))
    return Capacity(one_shot, in_two if one_shot < in_one else 0, pitch, world)


class PeerExchange:
    """Buffers that all ranks of a group can write to, and the kernels that use them.

    Creation and `close` are collective. NVLink multicast is never used: a multicast mapping of
    the buffer is an error.
    """

    def __init__(
        self, group: Any, device: torch.device, size: Capacity, timeout: float, portable: bool
    ) -> None:
        # Read by torch at its first allocation of this kind.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed as dist
        import torch.distributed._symmetric_memory as symmetric_memory

        self.size = size
        self.device = device
        self.portable = portable
        self._group = group
        self._rank = dist.get_rank(group)
        self._buffer = symmetric_memory.empty(size.bytes, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self._buffer, group)
        if self._handle.multicast_ptr:
            raise RuntimeError("the buffer has a multicast mapping, which must stay off")
        self._buffer.fill_(0xFF)
        self._uses = torch.zeros(
            size.one_shot_rows + size.two_shot_rows, dtype=torch.int32, device=device
        )
        self._failed = torch.zeros(1, dtype=torch.int32, device=device)
        self._sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._kernels: dict[tuple[Any, ...], program.Kernel] = {}
        self._arguments = _arguments_type(size.world)()
        self._arguments.failed = self._failed.data_ptr()
        self._arguments.pitch = size.pitch
        self._arguments.timeout_ns = int(timeout * 1e9)
        self._arguments.rank = self._rank
        self._most_polls = min(2**31 - 1, int(timeout * 1e6))  # a poll takes about a microsecond
        self._peers = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._arguments))
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody sends before all buffers are empty

    def close(self) -> None:
        """Free the buffer once every rank is done with it. Collective."""
        import torch.distributed as dist

        torch.cuda.synchronize(self.device)
        dist.barrier(self._group)
        self._kernels.clear()
        del self._handle, self._buffer

    def prepare(self, hidden: int, dtype: torch.dtype) -> None:
        """Compile every kernel for rows of `hidden` elements, so that capture needs no warm-up."""
        if self.portable:
            return  # Triton compiles at the first call, under capture too
        for operator in ("sum", "add_norm", "norm_add_norm"):
            for many in (False, True):
                for two_shot in (False, True) if self.size.two_shot_rows else (False,):
                    self._kernel(operator, hidden, dtype, None, two_shot, many)

    def takes(self, x: Tensor) -> bool:
        """Whether rows like those of `x` fit: whole 16-byte vectors, and not too many."""
        row_bytes = x.shape[-1] * x.element_size()
        return row_bytes % tuning.VECTOR_BYTES == 0 and row_bytes <= self.size.pitch

    def run(
        self,
        operator: str,
        x: Tensor,
        y: Tensor,
        residual: Tensor | None = None,
        total: Tensor | None = None,
        gammas: Gammas = (None, None),
        eps: Eps = (0.0, 0.0),
        fp8: str | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Launch `operator` over all rows, in as many calls as the capacity asks for.

        ``x``, ``residual``: [..., H]; ``y``, ``total``: outputs [..., H], contiguous; ``gammas``:
        fp32 [H] of the post-norm and the pre-norm.
        """
        hidden = x.shape[-1]
        operands = (
            _rows(x, "x"),
            y.view(-1, hidden),
            None if residual is None else _rows(residual, "residual"),
            None if total is None else total.view(-1, hidden),
        )
        count = operands[0].shape[0]
        kernels = -(-count // max(self.size.one_shot_rows, self.size.two_shot_rows))
        step = max(1, -(-count // max(kernels, 1)))
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            taken: Any = [None if rows is None else rows[part] for rows in operands]
            if self.portable:
                self._launch_portable(taken, gammas, eps)
                continue
            scales = scale
            if scale is not None and fp8 == "per_token":
                scales = scale.view(-1)[part]
            self._launch(operator, taken, gammas, eps, fp8, scales)

    def _launch(
        self, operator: str, operands: Rows, gammas: Gammas, eps: Eps, fp8: str | None,
        scale: Tensor | None,
    ) -> None:  # fmt: skip
        x, y, residual, total = operands
        size, a = self.size, self._arguments
        rows, hidden = x.shape
        itemsize = x.element_size()
        two_shot = rows > size.one_shot_rows
        many = rows > self._sms
        kernel = self._kernel(operator, hidden, x.dtype, fp8, two_shot, many)
        offset = size.one_shot_bytes if two_shot else 0
        for rank, address in enumerate(self._handle.buffer_ptrs):
            a.buffers[rank] = address + offset
        a.x, a.x_stride = x.data_ptr(), x.stride(0) * itemsize
        a.y = y.data_ptr()
        if residual is not None and total is not None:
            a.residual, a.residual_stride = residual.data_ptr(), residual.stride(0) * itemsize
            a.total = total.data_ptr()
        post_gamma, pre_gamma = gammas
        a.post_gamma = None if post_gamma is None else post_gamma.data_ptr()
        a.pre_gamma = None if pre_gamma is None else pre_gamma.data_ptr()
        a.scale = None if scale is None else scale.data_ptr()
        a.uses = self._uses.data_ptr() + (4 * size.one_shot_rows if two_shot else 0)
        a.rows = rows
        a.capacity = size.two_shot_rows if two_shot else size.one_shot_rows
        a.post_eps, a.pre_eps = eps
        blocks = min(rows, kernel.most_blocks)
        if blocks < rows:
            blocks -= 1 - blocks % 2  # no multiple of the ranks: a block's rows have all owners
        index = self.device.index
        with torch.cuda.device(index):
            kernel.launch(blocks, ctypes.addressof(self._pointers), _current_stream(index))

    def _launch_portable(self, operands: Rows, gammas: Gammas, eps: Eps) -> None:
        from gemma_fold.ops.collectives.portable import one_shot_kernel
        from gemma_fold.ops.kernels.rows import AT_END, EARLY, NO_PDL

        x, y, residual, total = operands
        rows, hidden = x.shape
        block = 1 << (hidden - 1).bit_length()
        unit = tuning.VECTOR_BYTES // x.element_size()
        pdl = torch.cuda.get_device_capability(self.device)[0] >= 9
        signal = AT_END if x.dtype == torch.float32 else EARLY
        with torch.cuda.device(self.device):
            one_shot_kernel[(min(rows, self._sms),)](
                self._peers, x.view(_WORDS[x.element_size()]), residual, *gammas, y, total,
                self._uses, rows, self.size.one_shot_rows, x.stride(0) // unit,
                0 if residual is None else residual.stride(0) // unit, self._most_polls, *eps,
                UNIT=unit, PITCH=self.size.pitch // x.element_size(), WORLD=self.size.world,
                RANK=self._rank, H=hidden, BLOCK=block, PDL=signal.value if pdl else NO_PDL.value,
                num_warps=min(32, max(4, block // 256)), launch_pdl=pdl, debug=True,
                enable_fp_fusion=False,
            )  # fmt: skip

    def _kernel(
        self,
        operator: str,
        hidden: int,
        dtype: torch.dtype,
        fp8: str | None,
        two_shot: bool,
        many: bool,
    ) -> program.Kernel:
        key = (operator, hidden, dtype, fp8, two_shot, many)
        kernel = self._kernels.get(key)
        if kernel is None:
            macros = defines(self.size.world, hidden, dtype, fp8, many)
            name = f"{operator}_{'two' if two_shot else 'one'}_shot"
            kernel = program.load(self.device.index, SOURCE, name, macros, macros["THREADS"])
            self._kernels[key] = kernel
        return kernel


def defines(
    world: int, hidden: int, dtype: torch.dtype, fp8: str | None, many: bool
) -> dict[str, int]:
    """Macros of ``kernel.cu``; `many` rows share what a few do not need."""
    shape = tuning.shape(hidden * dtype.itemsize)
    return {
        "H": hidden,
        "WORLD": world,
        "DTYPE": _DTYPES[dtype],
        "THREADS": shape.threads,
        "VECS": shape.vectors,
        "BLOCKS": tuning.blocks_per_sm(shape.threads) if many else 1,
        "MANY": int(many),
        "FP8": _FP8_MODES[fp8],
    }


def _rows(x: Tensor, name: str) -> Tensor:
    """``x`` as [rows, H] whose rows start at multiples of 16 bytes; a copy where they do not."""
    stride = row_stride(x, name)
    step = stride * x.element_size()
    if x.data_ptr() % tuning.VECTOR_BYTES or step % tuning.VECTOR_BYTES:
        return x.contiguous().clone().view(-1, x.shape[-1])
    return x.as_strided((x.numel() // x.shape[-1], x.shape[-1]), (stride, 1))


def _arguments_type(world: int) -> type[ctypes.Structure]:
    """The struct Args of ``kernel.cu`` for `world` ranks."""
    pointers = ("x", "residual", "post_gamma", "pre_gamma", "y", "total", "scale", "uses", "failed")
    fields: list[tuple[str, Any]] = [("buffers", ctypes.c_uint64 * world)]
    fields += [(name, ctypes.c_void_p) for name in pointers]
    fields += [("x_stride", ctypes.c_int64), ("residual_stride", ctypes.c_int64)]
    fields += [("pitch", ctypes.c_uint64), ("timeout_ns", ctypes.c_uint64)]
    fields += [(name, ctypes.c_int32) for name in ("rows", "capacity", "rank")]
    fields += [(name, ctypes.c_float) for name in ("post_eps", "pre_eps")]
    return type("Args", (ctypes.Structure,), {"_fields_": fields})
