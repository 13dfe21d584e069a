"""Every Triton kernel, compiled for Hopper by Triton's own compiler: that needs no GPU.

The interpreter, which runs the kernels elsewhere in these tests, takes programs that the compiler
refuses. What the compiled kernels compute is the GPU tests' business.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gemma_fold.ops import launch  # noqa: E402
from gemma_fold.ops.collectives import portable  # noqa: E402
from gemma_fold.ops.kernels.rms_norm_backward import rms_norm_backward_kernel  # noqa: E402
from gemma_fold.ops.kernels.rows import EARLY, LATE  # noqa: E402
from gemma_fold.ops.operators import (  # noqa: E402
    add_rms_norm,
    qk_rms_norm,
    qk_rms_norm_rope,
    qk_rms_norm_rope_cache,
    rms_norm,
    rms_norm_add_rms_norm,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(launch.INTERPRETED, reason="the kernels are being interpreted"),
]
WIDE_LOAD = re.compile(r"ld\.global(\.cg)?\.v4")
WIDE_STORE = re.compile(r"st\.global\.v4")
#: One bf16 or fp16 element at a time.
NARROW = re.compile(r"(ld|st)\.global\S*\.[bu]16")
HOPPER = GPUTarget("cuda", 90, 32)
FLOATS = {
    *("q_gamma", "k_gamma", "gamma", "post_gamma", "pre_gamma"),
    *("scale", "k_scale", "v_scale", "partial"),
}
INTEGERS = {"peers": "*i64", "uses": "*i32", "positions": "*i64", "slots": "*i64"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def kind(name: str, element: str) -> str:
    """The type of a kernel's argument, by its name."""
    if not name.endswith("_ptr"):
        fraction = name in ("eps", "post_eps", "pre_eps")
        wide = name.endswith("step") or name in ("n_positions", "n_slots", "n_cached")
        return "fp32" if fraction else "i64" if wide else "i32"
    stem = name.removesuffix("_ptr")
    return INTEGERS.get(stem) or ("*fp32" if stem in FLOATS else f"*{element}")


def ptx(kernel: Any, warps: int, constants: dict[str, Any], **types: str) -> str:
    """What ptxas is given for the kernel, after it has taken it."""
    signature = {
        name: "constexpr" if name in constants else types.get(name) or kind(name, "bf16")
        for name in kernel.arg_names
    }
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, positions, aligned)
    options = {"num_warps": warps, "launch_pdl": True, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=HOPPER, options=options)
    assert compiled.asm["cubin"]
    return str(compiled.asm["ptx"])


def row_constants(plan: launch.Plan) -> dict[str, Any]:
    return {**plan.constants, "NVIDIA": True}


@pytest.mark.parametrize("fp8", (None, "static", "per_token"))
@pytest.mark.parametrize(("rows", "hidden"), ((1, 640), (600, 1152), (4096, 5376), (64, 641)))
def test_row_kernels(
    rows: int, hidden: int, fp8: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.empty(1, device="meta", dtype=torch.bfloat16).expand(rows, hidden)
    x = torch.empty_like(x, memory_format=torch.contiguous_format)
    monkeypatch.setattr(launch, "_uses_pdl", lambda device: True)
    plans = [
        rms_norm.plan(x, None, fp8),
        add_rms_norm.plan(x, x, fp8),
        rms_norm_add_rms_norm.plan(x, x, fp8),
    ]
    for plan in plans:
        constants = row_constants(plan)
        assert constants["PDL"] in (EARLY.value, LATE.value)
        types = {"y_ptr": "*fp8e4nv"} if fp8 else {}
        if fp8 is None:
            constants["scale_ptr"] = None
        text = ptx(plan.kernel, plan.options["num_warps"], constants, **types)
        assert ".local" not in text
        assert WIDE_LOAD.search(text)


@pytest.mark.parametrize("in_place", (False, True))
@pytest.mark.parametrize("heads", ((32, 16, 128), (4, 1, 256), (3, 2, 96)))
def test_head_kernels(
    heads: tuple[int, int, int], in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q_heads, k_heads, size = heads
    meta = torch.empty(7, q_heads + k_heads, size, device="meta", dtype=torch.bfloat16)
    q, k = meta[:, :q_heads], meta[:, q_heads:]
    monkeypatch.setattr(launch, "_uses_pdl", lambda device: True)
    plan = qk_rms_norm.plan(q, k, in_place)
    text = ptx(plan.kernel, plan.options["num_warps"], plan.constants)
    assert WIDE_LOAD.search(text) and WIDE_STORE.search(text) and not NARROW.search(text)
    for dtype, element in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for interleaved in (False, True):
            cos_sin = torch.empty(64, size // 2, device="meta", dtype=dtype)
            plan = qk_rms_norm_rope.plan(q, k, in_place, cos_sin, None, interleaved)
            types = {"cos_sin_ptr": f"*{element}"}
            text = ptx(plan.kernel, plan.options["num_warps"], row_constants(plan), **types)
            assert WIDE_LOAD.search(text) and WIDE_STORE.search(text)
            assert dtype == torch.bfloat16 or not NARROW.search(text)  # a row of pairs may be odd


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float8_e4m3fn))
@pytest.mark.parametrize("section", ((0, 0, 0), (11, 11, 10)))
@pytest.mark.parametrize("heads", ((32, 16, 128), (16, 2, 256), (3, 2, 96)))
def test_head_kernels_that_write_a_cache(
    heads: tuple[int, int, int],
    section: tuple[int, int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q_heads, k_heads, size = heads
    meta = torch.empty(600, q_heads + 2 * k_heads, size, device="meta", dtype=torch.bfloat16)
    q, k, v = meta.split([q_heads, k_heads, k_heads], dim=1)
    cache, _ = torch.empty(9, k_heads, 16, 2 * size, device="meta", dtype=dtype).chunk(2, dim=-1)
    cos_sin = torch.empty(64, 64, device="meta", dtype=torch.float32)
    slots = torch.empty(600, device="meta", dtype=torch.int64)
    gain = torch.empty(size, device="meta")
    positions = torch.empty((3, 600) if any(section) else (600,), device="meta", dtype=torch.int64)
    monkeypatch.setattr(launch, "_uses_pdl", lambda device: True)
    for interleaved, in_turn, in_place in ((False, False, True), (True, True, False)):
        caches = cache.transpose(1, 2), cache.transpose(1, 2)
        tensors = (q, k, v, gain, gain, cos_sin, positions, *caches, slots, None, None)
        plan = qk_rms_norm_rope_cache.plan(tensors, in_place, interleaved, *section, in_turn)
        types = {"cos_sin_ptr": "*fp32"}
        constants = row_constants(plan)
        if dtype == torch.bfloat16:
            constants |= {"k_scale_ptr": None, "v_scale_ptr": None}
        else:
            types |= dict.fromkeys(("key_cache_ptr", "value_cache_ptr"), "*fp8e4nv")
        text = ptx(plan.kernel, plan.options["num_warps"], constants, **types)
        assert ".local" not in text
        assert WIDE_LOAD.search(text) and WIDE_STORE.search(text) and not NARROW.search(text)
        assert ("cvt.rn.satfinite.e4m3x2.f32" in text) == (dtype != torch.bfloat16)


def test_gamma_comes_before_the_wait_and_nothing_that_could_be_one_is_signalled_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "_uses_pdl", lambda device: True)
    for dtype, element in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        x = torch.empty(4, 1152, device="meta", dtype=dtype)
        plan = rms_norm_add_rms_norm.plan(x, x)
        types = dict.fromkeys(("x_ptr", "residual_ptr", "y_ptr", "total_ptr"), f"*{element}")
        constants = {**row_constants(plan), "scale_ptr": None}
        text = ptx(plan.kernel, plan.options["num_warps"], constants, **types)
        before, after = text.split("griddepcontrol.wait")
        assert "ld.global.cg" in before and "ld.global.cg" not in after
        assert ("griddepcontrol.launch_dependents" in text) == (dtype == torch.bfloat16)


def test_the_backward_kernel() -> None:
    ptx(rms_norm_backward_kernel, 4, {"UNIT": 8, "H": 1152, "BLOCK": 2048})


@pytest.mark.parametrize("world", (2, 3, 4, 8))
def test_the_all_reduce_kernel_of_every_rank(world: int) -> None:
    for rank in {0, 1, world - 1}:
        for missing in ((), ("post_gamma",), ("residual", "post_gamma", "pre_gamma", "total")):
            constants: dict[str, Any] = {f"{name}_ptr": None for name in missing}
            constants |= {"UNIT": 8, "PITCH": 1152, "WORLD": world, "RANK": rank}
            constants |= {"H": 1152, "BLOCK": 2048, "PDL": EARLY.value}
            text = ptx(portable.one_shot_kernel, 8, constants, x_ptr="*i16")
            assert text.count("ld.volatile.global") >= world - 1
