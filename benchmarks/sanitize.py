"""Runs every kernel under compute-sanitizer and records what it says.

    python -m benchmarks.sanitize --out benchmarks/results/norms_sanitizer.json
    python -m benchmarks.sanitize --world 2 --out benchmarks/results/all_reduce_sanitizer.json

Needs CUDA GPUs and compute-sanitizer. The norms' memory comes straight from the driver, one
allocation per tensor, so that memcheck sees a read past the end of any of them. With `--world` the
all-reduce runs instead, one process for each GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys

from benchmarks import run
from benchmarks.all_reduce_stress import WORKER, of_all_ranks
from benchmarks.result import OURS, Row, Settings

#: One allocation for each tensor.
ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
TOOLS = ("memcheck", "racecheck")
#: Where other processes write what a kernel reads.
PEER_TOOLS = (*TOOLS, "initcheck")
TOKENS = (1, 5, 600)
MEASURES = {
    "exit_code": "of the tool",
    "summary": "its last words, of each process",
    "said": "what it said beside that, where it found something",
    "calls": "of operators, in each process",
}
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


def sanitize(tool: str, world: int) -> Row:
    """What one tool found, in all processes."""
    checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    environment = {**os.environ, "PYTHONPATH": str(run.ROOT)}
    if world == 1:
        command = [*checker, sys.executable, "-m", "benchmarks.sanitize", "--run"]
        environment |= ALONE
    else:
        checker += ["--report-api-errors", "no"]  # torch asks for what a driver may not have
        command = of_all_ranks(world, *checker, sys.executable, str(WORKER), "short")
    done = subprocess.run(command, cwd=run.ROOT, env=environment, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"')]
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
    said = [line.strip("= ") for line in lines if line.startswith("=========")]
    values = {
        "exit_code": done.returncode,
        "summary": [line for line in said if "SUMMARY" in line],
        "said": said[:60] if done.returncode else [],
        "calls": found[0]["calls"] if found else 0,
    }
    return Row({"tool": tool}, OURS, values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="only run the kernels")
    parser.add_argument("--world", type=int, default=1, help="ranks of the all-reduce")
    run.add_options(parser, required=False)
    args = parser.parse_args()
    if args.run:
        print(json.dumps({"calls": run_kernels()}))
        return 0
    if args.out is None:
        parser.error("--out is needed")
    bench, tools = ("all_reduce", PEER_TOOLS) if args.world > 1 else ("norms", TOOLS)
    rows = []
    for tool in tools:
        rows.append(sanitize(tool, args.world))
        print(rows[-1], flush=True)
        run.write(
            args,
            f"{bench}_sanitizer",
            machine=run.gpus(args.world),
            versions=run.versions("torch", "triton"),
            settings=Settings(both={} if args.world > 1 else {**ALONE}),
            measures=MEASURES,
            rows=rows,
        )
    return 0 if all(row.values["exit_code"] == 0 for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
