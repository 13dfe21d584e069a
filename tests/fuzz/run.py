"""Run a fuzz target under atheris, guided by coverage, in any number of processes.

    python -m tests.fuzz.run TARGET --runs N --seconds S --jobs P --json FILE

TARGET is one of targets.TARGETS, or `all`, which shares runs and seconds out evenly. Exits with 1
where there are findings; each one's input lies in the folder named by --findings.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAMES = ("header", "config", "index", "manifest", "folder")
_DONE = re.compile(rb"Done (\d+) (?:runs )?in|stat::number_of_executed_units:\s*(\d+)")


def work(name: str, options: list[str]) -> None:
    """What each process does: instrument the package, then hand over to libFuzzer."""
    import atheris

    with atheris.instrument_imports(include=["gemma_fold", "json"]):
        from tests.fuzz import targets
    from tests.fuzz.mutate import mutate

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        # Half of the mutations are libFuzzer's own, of bytes.
        parts = data.split(targets.SEPARATOR)
        which = (seed >> 8) % len(parts)
        changed = mutate(parts[which], seed) if seed % 2 else None
        if changed is None:
            mutated: bytes = atheris.Mutate(data, max_size)
            return mutated
        parts[which] = changed
        return targets.SEPARATOR.join(parts)[:max_size]

    atheris.Setup([f"fuzz-{name}", *options], targets.TARGETS[name], custom_mutator=mutator)
    atheris.Fuzz()


def run_target(name: str, runs: int, seconds: int, jobs: int, findings: Path) -> dict[str, Any]:
    """Fuzz one target in `jobs` processes that share a growing corpus; what came of it."""
    start = time.monotonic()
    found = findings / name
    found.mkdir(parents=True, exist_ok=True)
    earlier = set(found.iterdir())
    with tempfile.TemporaryDirectory(prefix="gemma-fold-corpus-") as scratch:
        each = [runs // jobs + (number < runs % jobs) for number in range(jobs)]
        processes = []
        for number, share in enumerate(each):
            log = open(Path(scratch) / f"log-{number}", "wb")  # noqa: SIM115
            (Path(scratch) / "corpus").mkdir(exist_ok=True)
            options = [
                f"-runs={share}",
                f"-max_total_time={seconds}",
                "-reload=1",
                "-max_len=65536",
                "-timeout=60",
                "-rss_limit_mb=3072",
                "-print_final_stats=1",
                f"-artifact_prefix={found}/",
                f"-seed={1 + number}",
                str(Path(scratch) / "corpus"),
                *(str(folder) for folder in (HERE / "corpus" / name, HERE / "regressions" / name)
                  if folder.is_dir()),
            ]  # fmt: skip
            command = [sys.executable, "-m", "tests.fuzz.run", "--worker", name, "--", *options]
            processes.append(
                (subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=_env()), log)
            )
        codes = []
        for process, log in processes:
            codes.append(process.wait())
            log.close()
        logs = [(Path(scratch) / f"log-{n}").read_bytes() for n in range(jobs)]
    executions = [_executions(log) for log in logs]
    crashes = sorted(path.name for path in set(found.iterdir()) - earlier)
    failed = [log.decode(errors="replace")[-2000:] for log, c in zip(logs, codes, strict=True) if c]
    return {
        "executions": sum(executions),
        "seconds": round(time.monotonic() - start, 1),
        "executions_per_second": round(sum(executions) / max(time.monotonic() - start, 1e-9)),
        "processes": jobs,
        "exit_codes": codes,
        "findings": crashes,
        "last_lines_of_failed_processes": failed[:4],
    }


def _env() -> dict[str, str]:
    paths = os.pathsep.join(
        [
            str(ROOT),
            str(HERE.parent),
            str(HERE.parent / "support"),
            os.environ.get("PYTHONPATH", ""),
        ]
    )
    return {**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep), "OMP_NUM_THREADS": "1"}


def _executions(log: bytes) -> int:
    numbers = [int(a or b) for a, b in _DONE.findall(log)]
    numbers += [int(n) for n in re.findall(rb"^#(\d+)\t", log, re.MULTILINE)]
    return max(numbers, default=0)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("atheris", "safetensors", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def write_seeds() -> None:
    """Write the committed corpus anew from the tests' own small checkpoints."""
    sys.path.insert(0, str(HERE.parent / "support"))
    from checkpoints import write_checkpoint

    from gemma_fold.commands.convert import convert
    from tests.fuzz.targets import seeds

    with tempfile.TemporaryDirectory() as scratch:
        for shards in (1, 2):
            source, folded = Path(scratch) / f"model{shards}", Path(scratch) / f"folded{shards}"
            write_checkpoint(source, shards=shards)
            shutil.rmtree(source / "2_Dense")  # only what the folder target's inputs can hold
            for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
                (source / name).unlink()
            convert(source, folded)
            for target, inputs in seeds(source, folded).items():
                folder = HERE / "corpus" / target
                folder.mkdir(parents=True, exist_ok=True)
                for content in inputs.values():
                    (folder / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)


def main() -> int:
    """Parse the arguments and run; the exit code."""
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[4:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=(*NAMES, "all", "seeds"))
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--findings", type=Path, default=ROOT / ".cache" / "fuzz")
    given = parser.parse_args()
    if given.target == "seeds":
        write_seeds()
        return 0
    names = NAMES if given.target == "all" else (given.target,)
    result: dict[str, Any] = {
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "tests.fuzz.run", *sys.argv[1:]]),
        "versions": _versions(),
        "targets": {},
    }
    for name in names:
        runs, seconds = given.runs // len(names), given.seconds // len(names)
        result["targets"][name] = run_target(name, runs, seconds, given.jobs, given.findings)
        found = result["targets"][name]
        print(f"{name}: {found['executions']:,} executions in {found['seconds']} s, "
              f"{len(found['findings'])} findings {found['findings'][:3]}")  # fmt: skip
    targets = result["targets"].values()
    result["executions"] = sum(found["executions"] for found in targets)
    result["findings"] = sum(len(found["findings"]) for found in targets)
    result["seconds"] = round(sum(found["seconds"] for found in targets), 1)
    print(f"commit {result['commit']}: {result['executions']:,} executions, "
          f"{result['findings']} findings")  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    clean = all(not any(found["exit_codes"]) for found in targets)
    return 0 if clean and not result["findings"] else 1


if __name__ == "__main__":
    sys.exit(main())
