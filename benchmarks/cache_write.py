"""Times q and k norm, rotary embedding and the write of the paged cache, against the engine's.

    python -m benchmarks.cache_write --out benchmarks/results/cache_write_h200.json

Needs a CUDA GPU; what vLLM has is left out where it is not installed. Every implementation of one
shape is captured into a CUDA graph of many calls, which go round buffers that are twice the L2 in
all where there are few enough, each with slots of its own; the graphs are replayed in turn. Before
anything is timed, ours is compared bit for bit with the sequence that it replaces.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.graph_timing import Call, measure
from benchmarks.norm_peers import EPS, FP8, copy
from benchmarks.norms import drop_failing, record, rotation
from benchmarks.qk_peers import POSITIONS, one_after_another
from benchmarks.result import COPY, OURS, Row, Settings
from benchmarks.run import add_options, versions
from gemma_fold import ops
from gemma_fold.ops.operators.qk_rms_norm_rope import rotate

MEASURES = {
    "us": "microseconds of a call in a CUDA graph",
    "gb_s": "GB/s: what the operator must read and write, over the time of a call",
}
SETTINGS = Settings(
    both={"activations": "bfloat16", "cache": "blocks of 16, keys beside values, heads first"},
    stock={
        "vllm fused": "fused_qknorm_rope_cache: fp32 gamma and table; it writes k and v twice",
        "vllm": "rms_norm twice, rotary_embedding, reshape_and_cache_flash; bf16 gamma and table",
        "torch.compile+vllm": "norms and rotary embedding by Inductor; reshape_and_cache_flash",
    },
    ours={
        OURS: "fp32 gamma and table",
        "gemma_fold+vllm": "qk_rms_norm_rope; reshape_and_cache_flash",
    },
)
#: Heads of q and of k or v, head_dim, rotary_dim.
SHAPES = {
    "gemma3-270m": (4, 1, 256, 256),
    "gemma3-4b": (8, 4, 256, 256),
    "gemma3-12b": (16, 8, 256, 256),
    "gemma3-27b": (32, 16, 128, 128),
    "qwen3.5-35b-a3b": (16, 2, 256, 64),
}
TOKENS = (1, 8, 32, 64, 256, 1024, 4096, 16384)
PAGE = 16
MOST_CALLS = 256
Heads = tuple[int, int, int, int]


@dataclass(slots=True)
class Buffers:
    """Rotating fused tensors and slots; the rest is shared."""

    heads: Heads
    qkv: list[Tensor]  # bf16 [T, (q_heads + 2 * k_heads) * head_dim]
    slots: list[Tensor]  # int64 [T]
    gamma: Tensor  # fp32 [head_dim]
    cos_sin: Tensor  # fp32 [POSITIONS, rotary_dim]
    positions: Tensor  # int64 [T]
    key_cache: Tensor  # [blocks, PAGE, k_heads, head_dim]
    value_cache: Tensor
    scales: list[Tensor]  # fp32 [1]; none where the cache is bf16

    def split(self, i: int) -> Any:
        """q, k and v as heads."""
        q_heads, k_heads, size, _ = self.heads
        parts = self.qkv[i].unflatten(1, (-1, size))
        return parts.split([q_heads, k_heads, k_heads], dim=1)


def make(heads: Heads, dtype: torch.dtype, tokens: int, sets: int) -> Buffers:
    q_heads, k_heads, size, rotary_dim = heads
    width = (q_heads + 2 * k_heads) * size
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2, device="cuda") / rotary_dim)
    angles = torch.arange(POSITIONS, device="cuda")[:, None] * frequencies
    # A decoded token has a block of its own; a prompt fills block after block, in any order.
    places = 1 if tokens <= 256 else PAGE
    blocks = sets * -(-tokens // places)
    room = torch.zeros(blocks, k_heads, PAGE, 2 * size, device="cuda", dtype=dtype)
    start = torch.randperm(blocks, device="cuda").view(sets, -1, 1) * PAGE
    slots = (start + torch.arange(places, device="cuda")).flatten(1)[:, :tokens]
    caches = room.transpose(1, 2).split(size, dim=-1)
    scales = [torch.full((1,), s, device="cuda") for s in (0.05, 0.02)] if dtype == FP8 else []
    return Buffers(
        heads=heads,
        qkv=[torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(sets)],
        slots=list(slots.contiguous()),
        gamma=1.0 + torch.randn(size, device="cuda").bfloat16().float(),
        cos_sin=torch.cat((angles.cos(), angles.sin()), dim=-1),
        positions=torch.randint(0, POSITIONS, (tokens,), device="cuda"),
        key_cache=caches[0],
        value_cache=caches[1],
        scales=scales,
    )


def ours(b: Buffers) -> Call:
    named: Any = dict(zip(("k_scale", "v_scale"), b.scales, strict=False))
    shared = b.gamma, b.gamma, b.cos_sin, b.positions, b.key_cache, b.value_cache
    given = [(*b.split(i), *shared, slots, EPS) for i, slots in enumerate(b.slots)]
    return lambda i: ops.qk_rms_norm_rope_cache(*given[i], **named)


def turn(b: Buffers) -> Call:
    """In place, without a cache."""
    shared = b.gamma, b.gamma, b.cos_sin, b.positions, EPS
    given = [(*b.split(i)[:2], *shared) for i in range(len(b.qkv))]
    return lambda i: ops.qk_rms_norm_rope(*given[i])


def vllm_caches(b: Buffers) -> tuple[list[Tensor], str]:
    """Both caches as vLLM's operators take them, and what they call that kind."""
    caches = [b.key_cache, b.value_cache]
    return ([x.view(torch.uint8) for x in caches], "fp8") if b.scales else (caches, "auto")


def vllm_write(vllm: Any, b: Buffers, k: Callable[[int], Tensor] | None = None) -> Call:
    caches, kind = vllm_caches(b)
    scales = b.scales or [torch.ones(1, device="cuda")] * 2
    given = [b.split(i)[1:] for i in range(len(b.qkv))]

    def run(i: int) -> None:
        keys = given[i][0] if k is None else k(i)
        vllm.reshape_and_cache_flash(keys, given[i][1], *caches, b.slots[i], kind, *scales)

    return run


def vllm_three(vllm: Any, b: Buffers) -> Call:
    """Its kernels one by one: the norms write tensors of their own, as its layers do."""
    weight, table = b.gamma.bfloat16(), b.cos_sin.bfloat16()
    given = [b.split(i) for i in range(len(b.qkv))]
    normed = [[x.new_empty(x.shape) for x in heads[:2]] for heads in given]

    def turned(i: int) -> None:
        for x, out in zip(given[i], normed[i], strict=False):
            vllm.rms_norm(out, x, weight, EPS)
        q, k = (x.flatten(1) for x in normed[i])
        vllm.rotary_embedding(b.positions, q, k, b.heads[2], table, True)

    return one_after_another(turned, vllm_write(vllm, b, lambda i: normed[i][1]))


def vllm_fused(vllm: Any, b: Buffers) -> Call:
    q_heads, k_heads, size, rotary_dim = b.heads
    caches, kind = vllm_caches(b)
    return lambda i: vllm.fused_qknorm_rope_cache(
        b.qkv[i], b.gamma, b.gamma, b.cos_sin, b.positions, b.slots[i], *caches,
        q_heads, k_heads, size, rotary_dim, EPS, 0.0, kind, *b.scales,
    )  # fmt: skip


@partial(torch.compile, dynamic=True)
def _norm_rope(q: Tensor, k: Tensor, gamma: Tensor, table: Tensor, at: Tensor) -> list[Tensor]:
    found = []
    for x in (q, k):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)
        found.append(rotate((x32 * gamma).to(x.dtype), table[at], None, False))
    return found


def compiled(vllm: Any, b: Buffers) -> Call:
    """Norms and rotary embedding as vLLM's compiled Gemma has them, and its cache write."""
    given = [b.split(i)[:2] for i in range(len(b.qkv))]
    table = b.cos_sin.bfloat16()
    found: list[Tensor] = []

    def turned(i: int) -> None:
        found[:] = _norm_rope(*given[i], b.gamma, table, b.positions)

    return one_after_another(turned, vllm_write(vllm, b, lambda i: found[1]))


def calls_of(b: Buffers, vllm: Any) -> dict[str, Call]:
    found = {OURS: ours(b)}
    if vllm is not None:
        found["gemma_fold+vllm"] = one_after_another(turn(b), vllm_write(vllm, b))
        found["vllm"] = vllm_three(vllm, b)
        found["torch.compile+vllm"] = compiled(vllm, b)
        if hasattr(vllm, "fused_qknorm_rope_cache"):
            found["vllm fused"] = vllm_fused(vllm, b)
    return found


def traffic(heads: Heads, dtype: torch.dtype, tokens: int) -> tuple[int, int]:
    """Bytes that a call must read and write: the table as often as there are tokens."""
    q_heads, k_heads, size, rotary_dim = heads
    read = tokens * ((q_heads + 2 * k_heads) * size * 2 + rotary_dim * 4 + 16)
    return read, tokens * (q_heads * size * 2 + 2 * k_heads * size * dtype.itemsize)


def check(heads: Heads, dtype: torch.dtype, vllm: Any) -> None:
    """Ours leaves the bits of qk_rms_norm_rope and a write by torch, and of vLLM's write.

    Raises:
        AssertionError: it does not.
    """
    for tokens in (1, 37, 1000):
        b = make(heads, dtype, tokens, 1)
        before, rooms = b.qkv[0].clone(), (b.key_cache, b.value_cache)
        ours(b)(0)
        got = b.split(0)[0].clone(), *(x.float() for x in rooms)
        b.qkv[0].copy_(before)
        turn(b)(0)
        q, k, v = b.split(0)
        for x, cache, scale in zip((k, v), rooms, b.scales or (None, None), strict=True):
            cache.zero_()
            if scale is not None:
                x = (x.float() / scale).clamp(-448.0, 448.0).to(FP8)
            bits = torch.uint8 if scale is not None else x.dtype
            place = b.slots[0] // PAGE, b.slots[0] % PAGE
            cache.view(bits)[place] = x.view(bits)
        _same(got, (q, *rooms), f"torch, {heads}, {dtype}, {tokens} tokens")
        if vllm is not None:
            for x in rooms:
                x.zero_()
            vllm_write(vllm, b)(0)
            _same(got, (q, *rooms), f"vLLM, {heads}, {dtype}, {tokens} tokens")


def _same(got: tuple[Tensor, ...], want: tuple[Tensor, ...], what: str) -> None:
    for name, a, b in zip(("q", "keys", "values"), got, want, strict=True):
        if not torch.equal(a.float(), b.float()):
            count = int((a.float() != b.float()).sum())
            raise AssertionError(f"{name}: {count} elements differ from those of {what}")


def prepare(
    model: str, kinds: dict[str, torch.dtype], modules: dict[str, Any]
) -> Callable[[list[int], int], list[Row]]:
    """Checks and compiles everything for one model; returns what then measures it."""
    try:
        vllm = importlib.import_module("vllm._custom_ops")
    except Exception as error:  # reported, not fatal
        print(f"vllm is left out: {error!r}"[:300], flush=True)
        vllm = None
    heads = SHAPES[model]
    for dtype in kinds.values():
        check(heads, dtype, vllm)
        for tokens in (1, 37):
            drop_failing(calls_of(make(heads, dtype, tokens, 2), vllm))

    def run(tokens_list: list[int], rounds: int) -> list[Row]:
        rows = []
        for kind, dtype in kinds.items():
            for tokens in tokens_list:
                read, written = traffic(heads, dtype, tokens)
                moved = read + written
                sets, count = rotation(read, written, tokens, MOST_CALLS)
                found = {COPY: copy(moved, sets)}
                found |= drop_failing(calls_of(make(heads, dtype, tokens, sets), vllm))
                case = {"model": model, "cache": kind, "tokens": tokens}
                rows += [
                    Row(case, name, {"us": round(us, 3), "gb_s": round(moved / us / 1e3, 1)})
                    for name, us in measure(found, count, sets, rounds).items()
                ]
                torch.cuda.empty_cache()
        return rows

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--caches", nargs="+", choices=("bf16", "e4m3"), default=["bf16", "e4m3"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile-seconds", type=float, default=150.0)
    add_options(parser)
    args = parser.parse_args()
    args.peers = []  # what benchmarks.norms would load
    dtypes = {"bf16": torch.bfloat16, "e4m3": FP8}
    kinds = {name: dtypes[name] for name in args.caches}
    return record(
        [partial(prepare, model, kinds) for model in args.models],
        args,
        "cache_write",
        versions=versions("torch", "triton", "vllm"),
        settings=SETTINGS,
        measures=MEASURES,
    )


if __name__ == "__main__":
    raise SystemExit(main())
