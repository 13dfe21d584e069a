"""Times the fused all-reduce operators against their peers.

    torchrun --nproc-per-node 2 benchmarks/all_reduce.py --out benchmarks/results/all_reduce_x2.json

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

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.update(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed._symmetric_memory as symmetric_memory  # noqa: E402
import triton  # noqa: E402
from graph_timing import capture  # noqa: E402
from run_meta import git_commit, result_text  # noqa: E402
from torch import Tensor  # noqa: E402

from gemma_fold import ops  # noqa: E402

Call = Callable[[int], Any]
Call2 = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
HIDDEN = (2560, 4096, 5376, 8192)
OPERATORS = ("all_reduce_add_rms_norm", "all_reduce_rms_norm_add_rms_norm")
EPS = 1e-6
ROUNDS = 15
CALLS = ((128, 96), (512, 48), (2**31, 16))


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
    name = dist.group.WORLD.group_name
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
    tokens, world = b.x[0].shape[0], dist.get_world_size()

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
        if tokens * world > 4096 if one_shot else tokens <= world:
            continue
        kind = "one" if one_shot else "two"
        for pdl in (False, True):
            norms[f"flashinfer-{kind}{'-pdl' if pdl else ''}"] = partial(
                fused, one_shot=one_shot, pdl=pdl
            )
        alone[f"flashinfer-{kind}-pdl"] = partial(reduced, one_shot=one_shot)
    return norms, alone


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
    for name, norm in norms.items():
        if not sandwich:
            found[name] = lambda i, n=norm: n(b.x[i], b.residual[i])
    for tail_name, tail in tails(b, modules).items():
        for name, total in alone.items():
            after = tail.sandwich if sandwich else tail.add
            if after is not None and (sandwich or not name.startswith("flashinfer")):
                found[f"{name}+{tail_name}"] = lambda i, t=total, a=after: a(t(i), b.residual[i])
        for name, norm in norms.items():
            if sandwich and name.endswith("pdl"):
                # Its post-norm runs with a residual of zeros; the add and the pre-norm follow.
                found[f"{name}-norm+{tail_name}"] = lambda i, n=norm, a=tail.add: a(
                    n(b.x[i], b.zeros)[0], b.residual[i]
                )
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
    graphs = {name: capture(call, b.calls, b.sets) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for timed in [False] + [True] * rounds:
        for name, (graph, _) in graphs.items():
            dist.barrier()
            torch.cuda.synchronize()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if timed:
                times[name].append(start.elapsed_time(end) * 1000.0 / b.calls)
    medians = torch.tensor([statistics.median(values) for values in times.values()], device="cuda")
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    return dict(zip(times, medians.tolist(), strict=True))


def versions() -> dict[str, str]:
    found = {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["flashinfer"] = metadata.version("flashinfer-python")
    return found


def _with_ours(impl: str) -> bool:
    return impl.endswith(("+gemma_fold", "-portable"))


def ranks_meta(bench: str, out: Path, commit: str) -> dict[str, Any]:
    """The `meta` of a result file of this or another benchmark of all ranks."""
    world = dist.get_world_size()
    return {
        "bench": bench,
        "gpu": torch.cuda.get_device_name(0),
        "world": world,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "peers": versions(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "command": (
            f"torchrun --nproc-per-node {world} benchmarks/{bench}.py "
            f"--out benchmarks/results/{out.name}"
        ),
    }


def write(path: Path, rows: list[dict[str, Any]], commit: str) -> None:
    """`rows`: ours and the peers. `with_ours`: our Triton kernel, and peers' sums + our norms."""
    meta = ranks_meta("all_reduce", path, commit)
    theirs = [row for row in rows if not _with_ours(row["impl"])]
    with_ours = [row for row in rows if _with_ours(row["impl"])]
    path.write_text(result_text(meta, rows=theirs, with_ours=with_ours))


def summary(op: str, tokens: int, hidden: int, found: dict[str, float]) -> str:
    mine = found["gemma_fold"]
    us, name = min((us, name) for name, us in found.items() if "gemma_fold" not in name)
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
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--hidden", nargs="+", type=int, default=list(HIDDEN))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peers", nargs="*", default=["flashinfer", "flashinfer-norm"])
    parser.add_argument("--portable", action="store_true", help="time our Triton kernel, too")
    parser.add_argument("--commit", default=git_commit(), help="where .git does not travel along")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    rows: list[dict[str, Any]] = []
    buffer = symmetric_memory.empty(
        max(args.tokens) * max(args.hidden), dtype=torch.bfloat16, device=device
    )
    symmetric_memory.rendezvous(buffer, dist.group.WORLD)
    modules = load_modules(args.peers)
    for hidden in args.hidden:
        workspace = None
        if "comm" in modules:
            workspace = modules["comm"].create_allreduce_fusion_workspace(
                backend="trtllm", world_size=world, rank=rank, max_token_num=max(args.tokens),
                hidden_dim=hidden, dtype=torch.bfloat16, group=dist.group.WORLD,
            )  # fmt: skip
        space = ops.AllReduceWorkspace(hidden=hidden, max_tokens=max(args.tokens))
        portable = None
        if args.portable:
            portable = ops.AllReduceWorkspace(
                hidden=hidden, max_tokens=max(args.tokens), path="portable"
            )
        for op in OPERATORS:
            for tokens in args.tokens:
                b = Buffers(tokens, hidden)
                calls = {"gemma_fold": ours(op, b, space)}
                if portable is not None:
                    calls["gemma_fold-portable"] = ours(op, b, portable)
                calls |= peer_calls(op, b, buffer, modules, workspace)
                check(op, b, calls)
                found = measure(calls, b, args.rounds)
                shape = {"op": op, "tokens": tokens, "hidden": hidden, "world": world}
                rows += [
                    {**shape, "dtype": "bfloat16", "impl": name, "us": round(us, 3)}
                    for name, us in found.items()
                ]
                if rank == 0:
                    print(summary(op, tokens, hidden, found), flush=True)
        space.destroy()
        if portable is not None:
            portable.destroy()
        if workspace is not None:
            workspace.destroy()
    if rank == 0:
        write(args.out, rows, args.commit)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
