"""The norm implementations that `benchmarks.norms` compares: ours, the peers, and a plain copy.

Each builder takes buffers for one operator and shape and returns a ``call``, where ``call(i)`` runs
the implementation once on buffer set ``i``. A peer that is not installed, or that has no such
operator, is left out. Peers that cannot take fp32 gamma get bf16 weights, their best case.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.graph_timing import Call
from benchmarks.result import OURS, Settings
from gemma_fold import ops

EPS = 1e-6
FP8 = torch.float8_e4m3fn
MODULES = {
    "flashinfer": "flashinfer.norm",
    "quack": "quack.rmsnorm",
    "liger": "liger_kernel.ops.rms_norm",
}
SETTINGS = Settings(
    both={"activations": "bfloat16"},
    stock={
        "flashinfer": "its default, CuTe DSL kernels; bf16 weights",
        "flashinfer-cuda": "its CUDA C++ kernels, norm._USE_CUDA_NORM; bf16 weights",
        "quack": "fp32 gamma",
        "liger": 'casting mode "gemma", offset 1; bf16 weights',
        "torch.compile": "the forward of transformers, dynamic=True; bf16 weights",
    },
    ours={OURS: "fp32 gamma"},
)
_ROWS = {"rms_norm": (2, 2), "add_rms_norm": (4, 4), "rms_norm_add_rms_norm": (4, 4)}
# Bytes moved per activation element: (read, written).
BYTES = {
    **_ROWS,
    "add_rms_norm_": (4, 4),
    "rms_norm_add_rms_norm_": (4, 4),
    "qk_rms_norm": (2, 2),
    "qk_rms_norm_rope": (2, 2),
} | {
    f"{name}_fp8_{how}": (read, written - 1)
    for how in ("static", "per_token")
    for name, (read, written) in _ROWS.items()
}


@dataclass(slots=True)
class Buffers:
    """Rotating inputs and outputs for one operator and shape; gammas are shared."""

    x: list[Tensor]  # bf16 [T, H]
    residual: list[Tensor]  # bf16 [T, H]
    out: list[Tensor]  # bf16 [T, H]
    total: list[Tensor]  # bf16 [T, H]
    out8: list[Tensor]  # e4m3 [T, H]
    weight: Tensor  # bf16 [H], zero-centred
    gamma: Tensor  # fp32 [H] = 1 + weight
    scale: Tensor  # fp32 [1]


def make_buffers(tokens: int, hidden: int, sets: int, weight: Tensor) -> Buffers:
    def fill() -> list[Tensor]:
        shape = (tokens, hidden)
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]

    return Buffers(
        x=fill(),
        residual=fill(),
        out=fill(),
        total=fill(),
        out8=[torch.empty(tokens, hidden, device="cuda", dtype=FP8) for _ in range(sets)],
        weight=weight,
        gamma=1.0 + weight.float(),
        scale=torch.full((1,), 0.02, device="cuda"),
    )


def installed(name: str) -> ModuleType | None:
    """The peer's module for norms, or None."""
    try:
        return importlib.import_module(MODULES[name])
    except Exception as error:  # a peer that does not import here is reported, not fatal
        print(f"{name} is left out: {error!r}"[:300], flush=True)
        return None


def copy(moved: int, sets: int) -> Call:
    """A copy that moves so many bytes, read and written."""
    size = moved // 2
    source = [torch.empty(size, device="cuda", dtype=torch.uint8).random_() for _ in range(sets)]
    target = [torch.empty_like(buffer) for buffer in source]
    return lambda i: target[i].copy_(source[i])


def ours(op: str, b: Buffers) -> Call:
    g, s = b.gamma, b.scale
    table: dict[str, Call] = {
        "rms_norm": lambda i: ops.rms_norm(b.x[i], g, EPS),
        "add_rms_norm": lambda i: ops.add_rms_norm(b.x[i], b.residual[i], g, EPS),
        "rms_norm_add_rms_norm": lambda i: ops.rms_norm_add_rms_norm(
            b.x[i], b.residual[i], g, g, EPS, EPS
        ),
        "add_rms_norm_": lambda i: ops.add_rms_norm_(b.x[i], b.residual[i], g, EPS),
        "rms_norm_add_rms_norm_": lambda i: ops.rms_norm_add_rms_norm_(
            b.x[i], b.residual[i], g, g, EPS, EPS
        ),
        "rms_norm_fp8_static": lambda i: ops.rms_norm_fp8(b.x[i], g, EPS, s),
        "rms_norm_fp8_per_token": lambda i: ops.rms_norm_fp8(b.x[i], g, EPS),
        "add_rms_norm_fp8_static": lambda i: ops.add_rms_norm_fp8(b.x[i], b.residual[i], g, EPS, s),
        "add_rms_norm_fp8_per_token": lambda i: ops.add_rms_norm_fp8(b.x[i], b.residual[i], g, EPS),
        "rms_norm_add_rms_norm_fp8_static": lambda i: ops.rms_norm_add_rms_norm_fp8(
            b.x[i], b.residual[i], g, g, EPS, EPS, s
        ),
        "rms_norm_add_rms_norm_fp8_per_token": lambda i: ops.rms_norm_add_rms_norm_fp8(
            b.x[i], b.residual[i], g, g, EPS, EPS
        ),
    }
    return table[op]


def flashinfer_calls(fi: ModuleType, op: str, b: Buffers) -> Call | None:
    w, s = b.weight, b.scale

    def sandwich(i: int) -> None:
        fi.gemma_rmsnorm(b.x[i], w, EPS, out=b.out[i])
        fi.gemma_fused_add_rmsnorm(b.out[i], b.residual[i], w, EPS)

    def sandwich_fp8(i: int) -> None:
        fi.gemma_rmsnorm(b.x[i], w, EPS, out=b.out[i])
        fi.fused_add_rmsnorm_quant(b.out8[i], b.out[i], b.residual[i], w, s, EPS)

    table: dict[str, Call] = {
        "rms_norm": lambda i: fi.gemma_rmsnorm(b.x[i], w, EPS, out=b.out[i]),
        "add_rms_norm": lambda i: fi.gemma_fused_add_rmsnorm(b.x[i], b.residual[i], w, EPS),
        "rms_norm_add_rms_norm": sandwich,
        "rms_norm_fp8_static": lambda i: fi.rmsnorm_quant(b.out8[i], b.x[i], w, s, EPS),
        "add_rms_norm_fp8_static": lambda i: fi.fused_add_rmsnorm_quant(
            b.out8[i], b.x[i], b.residual[i], w, s, EPS
        ),
        "rms_norm_add_rms_norm_fp8_static": sandwich_fp8,
    }
    return table.get(op)


def flashinfer_backend(fi: Any, cuda: bool, call: Call) -> Call:
    """FlashInfer has CUDA C++ and CuTe DSL kernels; the switch is read at each call."""

    def run(i: int) -> None:
        fi._USE_CUDA_NORM = cuda
        call(i)

    return run


def quack_calls(quack: ModuleType, op: str, b: Buffers) -> Call | None:
    forward, g = quack._rmsnorm_fwd, b.gamma

    def norm(i: int) -> None:
        forward(b.x[i], g, b.out[i], eps=EPS)

    def add(i: int, x: list[Tensor] = b.x) -> None:
        forward(x[i], g, b.out[i], residual=b.residual[i], residual_out=b.total[i], eps=EPS)

    def sandwich(i: int) -> None:
        norm(i)
        add(i, b.out)

    table: dict[str, Call] = {
        "rms_norm": norm,
        "add_rms_norm": add,
        "rms_norm_add_rms_norm": sandwich,
    }
    return table.get(op)


def liger_calls(liger: ModuleType, op: str, b: Buffers) -> Call | None:
    fused = importlib.import_module("liger_kernel.ops.fused_add_rms_norm")
    w = b.weight

    def norm(i: int) -> Any:
        return liger.rms_norm_forward(b.x[i], w, EPS, 1.0, "gemma", None)[0]

    def add(i: int, x: Tensor | None = None) -> Any:
        x = b.x[i] if x is None else x
        return fused.fused_add_rms_norm_forward(x, b.residual[i], w, EPS, 1.0, "gemma")[:2]

    table: dict[str, Call] = {
        "rms_norm": norm,
        "add_rms_norm": add,
        "rms_norm_add_rms_norm": lambda i: add(i, norm(i)),
    }
    return table.get(op)


def compiled_calls(op: str, b: Buffers) -> Call | None:
    """torch.compile of the transformers forward, compiled once for every token count above one."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    norm = Gemma3RMSNorm(b.weight.shape[0], EPS).cuda()
    norm.weight = torch.nn.Parameter(b.weight, requires_grad=False)

    def add(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return norm(total), total

    forwards: dict[str, Callable[..., Any]] = {
        "rms_norm": lambda x, residual: norm(x),
        "add_rms_norm": add,
        "rms_norm_add_rms_norm": lambda x, residual: add(norm(x), residual),
    }
    if op not in forwards:
        return None
    forward = torch.compile(forwards[op], dynamic=True)
    return lambda i: forward(b.x[i], b.residual[i])
