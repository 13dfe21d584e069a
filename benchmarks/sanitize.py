"""Runs every kernel under compute-sanitizer and records what it says.

    python benchmarks/sanitize.py --out benchmarks/results/norms_sanitizer.json
    python benchmarks/sanitize.py --world 2 --out benchmarks/results/all_reduce_sanitizer.json

Needs CUDA GPUs and compute-sanitizer. The norms' memory comes straight from the driver, one
allocation per tensor, so that memcheck sees a read past the end of any of them. With `--world` the
all-reduce runs instead, one process for each GPU.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "tests" / "gpu" / "all_reduce_worker.py"
TOOLS = ("memcheck", "racecheck")
#: Where other processes write what a kernel reads.
PEER_TOOLS = (*TOOLS, "initcheck")
TOKENS = (1, 5, 600)
HIDDEN = (64, 640, 641, 1152, 5376, 16384)
#: (tokens, hidden) whose rows share programs, beside all of the above.
SHARED = ((1026, 640), (1026, 1152), (601, 4096), (201, 8192))


def run_kernels() -> int:
    """Every operator, dtype and kind of configuration, on small shapes."""
    import torch

    from gemma_fold import ops

    calls = 0
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, hidden in (*itertools.product(TOKENS, HIDDEN), *SHARED):
            gamma = torch.rand(hidden, device="cuda")
            scale = torch.ones(1, device="cuda")
            x = torch.rand(tokens, hidden, device="cuda").to(dtype)
            ops.rms_norm(x, gamma)
            ops.add_rms_norm(x, x, gamma)
            ops.rms_norm_add_rms_norm(x, x, gamma, gamma)
            ops.add_rms_norm_(x.clone(), x.clone(), gamma)
            ops.rms_norm_add_rms_norm_(x.clone(), x.clone(), gamma, gamma)
            for given in (None, scale):
                ops.rms_norm_fp8(x, gamma, 1e-6, given)
                ops.add_rms_norm_fp8(x, x, gamma, 1e-6, given)
                ops.rms_norm_add_rms_norm_fp8(x, x, gamma, gamma, 1e-6, 1e-6, given)
            torch.ops.gemma_fold.rms_norm_backward(x, x, gamma, 1e-6)
            calls += 12
        for q_heads, k_heads, size in ((32, 16, 128), (4, 1, 256), (3, 2, 96)):
            for tokens in TOKENS:
                qkv = torch.rand(tokens, q_heads + 2 * k_heads, size, device="cuda").to(dtype)
                gamma = torch.rand(size, device="cuda")
                q, k = qkv[:, :q_heads], qkv[:, q_heads : q_heads + k_heads]
                ops.qk_rms_norm(q, k, gamma, gamma)
                # The last position lies outside the table.
                at = torch.arange(tokens, device="cuda")
                for table in (qkv.new_ones(tokens, size), torch.ones(tokens, size // 2).cuda()):
                    for interleaved in (False, True):
                        ops.qk_rms_norm_rope(
                            q, k, gamma, gamma, table, at + 1, interleaved=interleaved
                        )
                calls += 5
    torch.cuda.synchronize()
    return calls


def sanitize(tool: str, world: int) -> dict[str, object]:
    """The summary lines of one tool, one a process, and the exit code."""
    checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if world == 1:
        command = [*checker, sys.executable, __file__, "--run"]
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    else:
        checker += ["--report-api-errors", "no"]  # torch asks for what a driver may not have
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
        each = [*checker, sys.executable, str(WORKER), "short"]
        command = [*launcher, f"--nproc-per-node={world}", *each]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = (run.stdout + run.stderr).splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"')]
    if run.returncode:
        print(run.stdout[-3000:], run.stderr[-3000:], file=sys.stderr)
    said = [line.strip("= ") for line in lines if line.startswith("=========")]
    return {
        "tool": tool,
        "exit_code": run.returncode,
        "summary": [line for line in said if "SUMMARY" in line],
        "said": said[:60] if run.returncode else [],
        "calls": found[0]["calls"] if found else 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="only run the kernels")
    parser.add_argument("--world", type=int, default=1, help="ranks of the all-reduce")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    if args.run:
        print(json.dumps({"calls": run_kernels()}))
        return 0
    import torch
    import triton

    bench, tools = ("all_reduce", PEER_TOOLS) if args.world > 1 else ("norms", TOOLS)
    meta = {
        "bench": f"{bench}_sanitizer",
        "world": args.world,
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": args.commit,
        "date": datetime.date.today().isoformat(),
        "command": (
            f"python benchmarks/sanitize.py {f'--world {args.world} ' if args.world > 1 else ''}"
            f"--out benchmarks/results/{args.out.name}"
        ),
    }
    results = []
    for tool in tools:
        results.append(sanitize(tool, args.world))
        print(json.dumps(results[-1]), flush=True)
        args.out.write_text(json.dumps({"meta": meta, "runs": results}, indent=1) + "\n")
    return 0 if all(result["exit_code"] == 0 for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
