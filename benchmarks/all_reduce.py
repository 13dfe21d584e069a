"""Times the fused all-reduce operators against their peers.

    torchrun --nproc-per-node 2 -m benchmarks.all_reduce --out benchmarks/results/all_reduce_x2.json

Needs two GPUs or more that reach each other's memory. Every implementation of one operator and
shape is captured into a CUDA graph of many calls over rotating buffers, and the graphs are replayed
in turn, round after round; the figure is the median time of a call on the slowest rank. Every
result is checked against the fp32 formula before anything is timed.

Peers: FlashInfer's `trtllm` backend (one-shot and two-shot, with and without programmatic dependent
launch), NCCL, and torch's symmetric-memory all-reduces. Where a peer does not fuse what follows the
sum, a second launch does: `+flashinfer` is FlashInfer's own fused add + norm, `+torch.compile` is
Inductor's kernel for all that follows, sandwich included, and `+gemma_fold` our single-GPU kernel.
Those last rows say what the fusion itself adds; they are not compositions of peers and stand
apart. FlashInfer's all-reduce fuses an add + norm but no sandwich: there it runs with a residual
of zeros for the post-norm, or reduces only. NVLink multicast is off.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

#: Before anything that might read it is imported.
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
os.environ.update(ENVIRONMENT)

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from benchmarks import graph_timing, run
from benchmarks.graph_timing import Call
from benchmarks.result import OURS, Row, Settings
from gemma_fold import ops

BOTH = {"activations": "bfloat16", **ENVIRONMENT}
SETTINGS = Settings(
    both=BOTH,
    stock={
        "flashinfer": "backend=trtllm, fp32_acc=True; use_oneshot and launch_with_pdl each way",
        "flashinfer's add and norm": "weight_bias=1.0; bf16 weights",
        "torch.compile": "the forward of transformers, dynamic=True; bf16 weights",
    },
    ours={OURS: "fp32 gamma"},
)
MEASURES = {"us": "microseconds of a call in a CUDA graph, of the slowest rank"}
Call2 = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
HIDDEN = (2560, 4096, 5376, 8192)
OPERATORS = ("all_reduce_add_rms_norm", "all_reduce_rms_norm_add_rms_norm")
EPS = 1e-6
ROUNDS = 15
CALLS = ((128, 96), (512, 48), (2**31, 16))


def world() -> dist.ProcessGroup:
    """All ranks."""
    group = dist.group.WORLD
    assert group is not None, "torchrun starts the ranks"
    return group


class Buffers:
    """Rotating inputs; gammas are shared. Residuals and gammas are equal on all ranks."""

    def __init__(self, tokens: int, hidden: int) -> None:
        self.calls = next(calls for most, calls in CALLS if tokens <= most)
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        bytes_read = 4 * tokens * hidden
        # Rows of a decode step stay in the L2, as in a model; large inputs come from memory.
        sets = 2 if bytes_read * self.calls < l2 else min(self.calls, 2 * l2 // bytes_read + 2)
        self.sets = max(2, sets)
        new = lambda: torch.randn(tokens, hidden, device="cuda").bfloat16()  # noqa: E731
        self.x = [new() for _ in range(self.sets)]
        self.own = [x.clone() for x in self.x]
        self.residual = [new() for _ in range(self.sets)]
        self.weight = torch.randn(hidden, device="cuda").bfloat16()
        for tensor in (*self.residual, self.weight):
            dist.broadcast(tensor, 0)
        self.gamma = 1.0 + self.weight.float()
        self.zeros = torch.zeros(tokens, hidden, device="cuda", dtype=torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Tail:
    """What follows a sum that is not fused with it: functions of (reduced, residual)."""

    add: Call2  # residual add, norm
    sandwich: Call2 | None  # norm, residual add, norm; None where that takes more than a launch


def tails(b: Buffers, modules: dict[str, Any]) -> dict[str, Tail]:
    """Second launches by name: peers', and our own."""
    found = {
        "torch.compile": Tail(
            lambda x, r: modules["add"](x, r, b.weight),
            lambda x, r: modules["sandwich"](x, r, b.weight),
        ),
        "gemma_fold": Tail(
            lambda x, r: ops.add_rms_norm(x, r, b.gamma, EPS),
            lambda x, r: ops.rms_norm_add_rms_norm(x, r, b.gamma, b.gamma, EPS, EPS),
        ),
    }
    if fused_add := modules.get("fused_add"):

        def add(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            fused_add(x, residual, b.weight, EPS)  # in place, in both
            return x, residual

        found["flashinfer"] = Tail(add, None)
    return found


def _compiled() -> dict[str, Any]:
    """Inductor's kernels for the transformers forward, bf16 weights."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)
        return (x32 * (1.0 + weight.float())).to(x.dtype)

    def add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return norm(total, weight), total

    def sandwich(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add(norm(x, weight), residual, weight)

    return {
        "add": torch.compile(add, dynamic=True),
        "sandwich": torch.compile(sandwich, dynamic=True),
    }


def ours(op: str, b: Buffers, space: ops.AllReduceWorkspace) -> Call:
    if op == "all_reduce_add_rms_norm":
        return lambda i: ops.all_reduce_add_rms_norm(b.x[i], b.residual[i], b.gamma, space, EPS)
    return lambda i: ops.all_reduce_rms_norm_add_rms_norm(
        b.x[i], b.residual[i], b.gamma, b.gamma, space, EPS, EPS
    )


def sums(b: Buffers, buffer: Tensor) -> dict[str, Callable[[int], Tensor]]:
    """All-reduces alone: NCCL, and torch's over symmetric memory, which x is copied into first."""
    name = world().group_name
    staged = buffer[: b.x[0].numel()].view_as(b.x[0])

    def nccl(i: int) -> Tensor:
        dist.all_reduce(b.own[i])  # in place
        return b.own[i]

    def one_shot(i: int) -> Tensor:
        staged.copy_(b.x[i])
        return torch.ops.symm_mem.one_shot_all_reduce(staged, "sum", name)

    def two_shot(i: int) -> Tensor:
        staged.copy_(b.x[i])
        return torch.ops.symm_mem.two_shot_all_reduce_(staged, "sum", name)

    return {"nccl": nccl, "symm_mem-one": one_shot, "symm_mem-two": two_shot}


def flashinfer_sums(
    b: Buffers, comm: Any, workspace: Any
) -> tuple[dict[str, Any], dict[str, Callable[[int], Tensor]]]:
    """FlashInfer's all-reduce + add + norm by variant, and its all-reduce alone."""
    pattern = comm.AllReduceFusionPattern
    tokens, size = b.x[0].shape[0], dist.get_world_size()

    def fused(x: Tensor, residual: Tensor, one_shot: bool, pdl: bool) -> tuple[Tensor, Tensor]:
        y, total = torch.empty_like(x), torch.empty_like(x)
        comm.allreduce_fusion(
            x, workspace, pattern.kARResidualRMSNorm, launch_with_pdl=pdl, residual_in=residual,
            residual_out=total, norm_out=y, rms_gamma=b.weight, rms_eps=EPS, use_oneshot=one_shot,
            fp32_acc=True, weight_bias=1.0,
        )  # fmt: skip
        return y, total

    def reduced(i: int, one_shot: bool) -> Tensor:
        y = torch.empty_like(b.x[i])
        comm.allreduce_fusion(
            b.x[i], workspace, pattern.kAllReduce, launch_with_pdl=True, output=y,
            use_oneshot=one_shot, fp32_acc=True,
        )  # fmt: skip
        return y

    norms: dict[str, Any] = {}
    alone: dict[str, Callable[[int], Tensor]] = {}
    for one_shot in (True, False):
        # Outside these, its kernels refuse.
        if tokens * size > 4096 if one_shot else tokens <= size:
            continue
        kind = "one" if one_shot else "two"
        for pdl in (False, True):
            norms[f"flashinfer-{kind}{'-pdl' if pdl else ''}"] = partial(
                fused, one_shot=one_shot, pdl=pdl
            )
        alone[f"flashinfer-{kind}-pdl"] = partial(reduced, one_shot=one_shot)
    return norms, alone


def _fused(b: Buffers, norm: Call2, i: int) -> Any:
    return norm(b.x[i], b.residual[i])


def _summed(b: Buffers, total: Callable[[int], Tensor], after: Call2, i: int) -> Any:
    return after(total(i), b.residual[i])


def _normed(b: Buffers, norm: Call2, add: Call2, i: int) -> Any:
    """The post-norm runs with a residual of zeros; the add and the pre-norm follow."""
    return add(norm(b.x[i], b.zeros)[0], b.residual[i])


def peer_calls(
    op: str, b: Buffers, buffer: Tensor, modules: dict[str, Any], workspace: Any
) -> dict[str, Call]:
    """Every peer, and every composition of two launches, for one operator and shape."""
    found: dict[str, Call] = {}
    alone = sums(b, buffer)
    norms: dict[str, Any] = {}
    if workspace is not None:
        norms, more = flashinfer_sums(b, modules["comm"], workspace)
        alone |= more
    sandwich = op == "all_reduce_rms_norm_add_rms_norm"
    if not sandwich:
        found |= {name: partial(_fused, b, norm) for name, norm in norms.items()}
    for tail_name, tail in tails(b, modules).items():
        for name, total in alone.items():
            after = tail.sandwich if sandwich else tail.add
            if after is not None and (sandwich or not name.startswith("flashinfer")):
                found[f"{name}+{tail_name}"] = partial(_summed, b, total, after)
        for name, norm in norms.items():
            if sandwich and name.endswith("pdl"):
                found[f"{name}-norm+{tail_name}"] = partial(_normed, b, norm, tail.add)
    return found


def check(op: str, b: Buffers, calls: dict[str, Call]) -> None:
    """Every implementation against the formula in fp32, unrounded in between."""
    parts = [torch.empty_like(b.x[0]) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, b.x[0])

    def norm(v: Tensor) -> Tensor:
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + EPS) * b.gamma

    total = torch.stack([part.float() for part in parts]).sum(0)
    if op == "all_reduce_rms_norm_add_rms_norm":
        total = norm(total)
    want = norm(total + b.residual[0].float())
    keep = b.residual[0].clone()
    for name, call in calls.items():
        y = call(0)[0].float()
        b.residual[0].copy_(keep)  # FlashInfer's add works in place, and so does NCCL
        b.own[0].copy_(b.x[0])
        error = ((y - want).norm() / want.norm()).item()
        if not error < 0.01:
            raise AssertionError(f"{op} by {name}: relative error {error}")


def measure(calls: dict[str, Call], b: Buffers, rounds: int) -> dict[str, float]:
    """Median microseconds of a call, the slowest rank's."""

    def together() -> None:
        dist.barrier()
        torch.cuda.synchronize()

    found = graph_timing.measure(calls, b.calls, b.sets, rounds, together)
    medians = torch.tensor(list(found.values()), device="cuda")
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    return {name: round(us, 3) for name, us in zip(found, medians.tolist(), strict=True)}


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """This process as a rank of all that torchrun started: its number, and how many there are."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    torch.manual_seed(dist.get_rank())
    yield dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()


def rows_of(op: str, tokens: int, hidden: int, found: dict[str, float]) -> list[Row]:
    case = {"op": op, "hidden": hidden, "tokens": tokens}
    return [Row(case, name, {"us": us}) for name, us in found.items()]


def write(args: argparse.Namespace, what: str, settings: Settings, rows: list[Row]) -> None:
    """The result of a benchmark of all ranks."""
    run.write(
        args,
        what,
        machine=run.gpus(dist.get_world_size()),
        versions={
            **run.versions("torch", "triton", "flashinfer"),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        },
        settings=settings,
        measures=MEASURES,
        rows=rows,
    )


def summary(op: str, tokens: int, hidden: int, found: dict[str, float]) -> str:
    mine = found[OURS]
    us, name = min((us, name) for name, us in found.items() if OURS not in name)
    return f"{op} H {hidden} T {tokens}: {mine:.2f} against {us:.2f} ({name}): {mine / us:.2f}"


def load_modules(peers: list[str]) -> dict[str, Any]:
    modules = _compiled()
    if "flashinfer" in peers:
        import flashinfer.comm

        modules["comm"] = flashinfer.comm
    if "flashinfer-norm" in peers:
        import flashinfer.norm

        modules["fused_add"] = flashinfer.norm.gemma_fused_add_rmsnorm
    return modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--hidden", nargs="+", type=int, default=list(HIDDEN))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peers", nargs="*", default=["flashinfer", "flashinfer-norm"])
    parser.add_argument("--portable", action="store_true", help="time our Triton kernel, too")
    run.add_options(parser)
    args = parser.parse_args()
    with ranks() as (rank, size):
        rows: list[Row] = []
        most = max(args.tokens) * max(args.hidden)
        here = torch.device("cuda", torch.cuda.current_device())
        buffer = symmetric_memory.empty(most, dtype=torch.bfloat16, device=here)
        symmetric_memory.rendezvous(buffer, world())
        modules = load_modules(args.peers)
        for hidden in args.hidden:
            workspace = None
            if "comm" in modules:
                workspace = modules["comm"].create_allreduce_fusion_workspace(
                    backend="trtllm", world_size=size, rank=rank, max_token_num=max(args.tokens),
                    hidden_dim=hidden, dtype=torch.bfloat16, group=world(),
                )  # fmt: skip
            paths = {OURS: "auto"} | ({f"{OURS}-portable": "portable"} if args.portable else {})
            spaces = {
                name: ops.AllReduceWorkspace(hidden=hidden, max_tokens=max(args.tokens), path=path)
                for name, path in paths.items()
            }
            for op in OPERATORS:
                for tokens in args.tokens:
                    b = Buffers(tokens, hidden)
                    calls = {name: ours(op, b, space) for name, space in spaces.items()}
                    calls |= peer_calls(op, b, buffer, modules, workspace)
                    check(op, b, calls)
                    found = measure(calls, b, args.rounds)
                    rows += rows_of(op, tokens, hidden, found)
                    if rank == 0:
                        print(summary(op, tokens, hidden, found), flush=True)
            for space in (*spaces.values(), *filter(None, [workspace])):
                space.destroy()
        if rank == 0:
            write(args, "all_reduce", SETTINGS, rows)


if __name__ == "__main__":
    main()
