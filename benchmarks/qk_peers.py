"""The q and k operators that `benchmarks.norms` compares, on views of one fused qkv tensor.

Peers launch once for q and once for k. With rotary embedding everyone reads the same fp32 table of
cosines and sines, the only kind FlashInfer takes.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.graph_timing import Call
from benchmarks.norm_peers import EPS, flashinfer_backend
from benchmarks.result import OURS
from gemma_fold import ops
from gemma_fold.ops.operators.qk_rms_norm_rope import rotate

POSITIONS = 32768
Pair = tuple[Tensor, Tensor]


@dataclass(slots=True)
class HeadBuffers:
    """Rotating fused tensors; gains, table and positions are shared."""

    pairs: list[Pair]  # bf16 [T, q_heads, head_dim] and [T, k_heads, head_dim], strided views
    weight: Tensor  # bf16 [head_dim], zero-centred
    gamma: Tensor  # fp32 [head_dim] = 1 + weight
    cos_sin: Tensor  # fp32 [POSITIONS, head_dim]
    positions: Tensor  # int64 [T]


def make_heads(heads: tuple[int, int, int], tokens: int, sets: int) -> HeadBuffers:
    q_heads, k_heads, size = heads
    weight = torch.randn(size, device="cuda").bfloat16()
    frequencies = 10000.0 ** -(torch.arange(0, size, 2, device="cuda") / size)
    angles = torch.arange(POSITIONS, device="cuda")[:, None] * frequencies
    pairs = []
    for _ in range(sets):
        shape = (tokens, q_heads + 2 * k_heads, size)
        qkv = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        pairs.append((qkv[:, :q_heads], qkv[:, q_heads : q_heads + k_heads]))
    return HeadBuffers(
        pairs=pairs,
        weight=weight,
        gamma=1.0 + weight.float(),
        cos_sin=torch.cat((angles.cos(), angles.sin()), dim=-1),
        positions=torch.randint(0, POSITIONS, (tokens,), device="cuda"),
    )


def ours(op: str, b: HeadBuffers) -> Call:
    g = b.gamma
    if op == "qk_rms_norm":
        return lambda i: ops.qk_rms_norm(*b.pairs[i], g, g, EPS)
    return lambda i: ops.qk_rms_norm_rope(*b.pairs[i], g, g, b.cos_sin, b.positions, EPS)


def flashinfer_norms(fi: ModuleType, b: HeadBuffers) -> Call:
    def both(i: int) -> None:
        for heads in b.pairs[i]:
            fi.gemma_rmsnorm(heads, b.weight, EPS, out=heads)

    return flashinfer_backend(fi, False, both)


def flashinfer_rope(b: HeadBuffers) -> Call:
    """In place. Its first call compiles CUDA C++ for minutes where no built module is found."""
    rope = importlib.import_module("flashinfer.rope").apply_rope_with_cos_sin_cache_inplace
    size = b.gamma.shape[0]
    return lambda i: rope(b.positions, *b.pairs[i], size, b.cos_sin)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """The forward of Gemma's norm in transformers."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)
    return (x32 * (1.0 + weight.float())).to(x.dtype)


def _rope(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> Pair:
    rows = cos_sin[positions]
    return rotate(q, rows, None, False), rotate(k, rows, None, False)


def _norm_rope(q: Tensor, k: Tensor, weight: Tensor, cos_sin: Tensor, positions: Tensor) -> Pair:
    return _rope(_norm(q, weight), _norm(k, weight), cos_sin, positions)


# Into tensors of their own: Inductor would copy to get results in place.
_compiled_rope = torch.compile(_rope, dynamic=True)
_compiled_norm_rope = torch.compile(_norm_rope, dynamic=True)


def one_after_another(*calls: Call) -> Call:
    def run(i: int) -> None:
        for call in calls:
            call(i)

    return run


def head_calls(op: str, b: HeadBuffers, modules: dict[str, Any]) -> dict[str, Call]:
    """Every implementation of a q and k operator that exists here."""
    fi = modules.get("flashinfer") if modules.get("flashinfer-cute") else None
    found = {OURS: ours(op, b)}
    if op == "qk_rms_norm":
        if fi:
            found["flashinfer+flashinfer"] = flashinfer_norms(fi, b)
        return found
    if fi and modules.get("flashinfer-rope"):
        calls = flashinfer_norms(fi, b), flashinfer_rope(b)
        found["flashinfer+flashinfer+flashinfer"] = one_after_another(*calls)
    if modules.get("compile"):
        table = b.cos_sin, b.positions
        calls = ours("qk_rms_norm", b), lambda i: _compiled_rope(*b.pairs[i], *table)
        found["gemma_fold+torch.compile"] = one_after_another(*calls)
        found["torch.compile"] = lambda i: _compiled_norm_rope(*b.pairs[i], b.weight, *table)
    return found


def check(op: str, heads: tuple[int, int, int]) -> None:
    """Ours against float64: no further from it than the roundings of the dtype."""
    b = make_heads(heads, 37, 1)
    g = b.gamma.double()
    want = []
    for x in b.pairs[0]:
        x64 = x.double()
        y = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + EPS) * g
        if op == "qk_rms_norm_rope":
            y = rotate(y, b.cos_sin.double(), b.positions, False)
        want.append(y)
    ours(op, b)(0)
    for got, exact in zip(b.pairs[0], want, strict=True):
        error = ((got.double() - exact).norm() / exact.norm()).item()
        if not error < 0.01:
            raise AssertionError(f"{op}: relative error {error} for heads {heads}")
