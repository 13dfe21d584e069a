"""Time `gemma-fold convert` against `cp -r`, and what else a user waits for.

    python -m benchmarks.convert --out NAME.json               # 4 GB in 8 shards, five rounds
    python -m benchmarks.convert --size-gb 16 --out NAME.json  # is peak memory the same?
    python -m benchmarks.convert --reflink xfs --out NAME.json # as root, on a loop-mounted image
    python -m benchmarks.convert --startup --out NAME.json     # --help; inspect of sparse shards

`convert` alternates with `cp -r` of the same tree, and both are timed until their whole output is
on the disk.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.result import Machine, Row, Settings
from benchmarks.run import ROOT, add_options, output, versions, write

GEMMA_FOLD = [sys.executable, "-m", "gemma_fold"]
# In a process of its own: a child's peak memory counts from that of the process that starts it, so
# this one must stay small.
TREES = [sys.executable, "-m", "benchmarks.trees"]
MEASURES = {
    "seconds": "until all output is on the disk",
    "seconds_repeats": "the same, in each round",
    "cpu_seconds": "of the command and of syncing its output",
    "peak_rss_mb": "megabytes of memory, the most in any round",
    "bytes": "of the source",
    "load_before": "of the machine, over a minute",
}
#: How `convert` copies, as it says itself.
MOVED = {
    f"{how}_bytes": "of the output, moved that way"
    for how in ("reflink", "copy_file_range", "sendfile", "read_write")
}


@dataclass(frozen=True)
class Run:
    """A finished command; its seconds and CPU seconds include the syncing of its output."""

    seconds: float
    cpu_seconds: float
    peak_rss: int
    stdout: str


def run(command: list[str], synced: Path | None = None) -> Run:
    """Run a command to success, then push the folder it wrote to the disk."""
    with tempfile.TemporaryFile("w+") as output:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        process = subprocess.Popen(command, stdout=output, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
        if synced is not None:
            sync_tree(synced)
        seconds = time.perf_counter() - begin
        cpu = usage.ru_utime + usage.ru_stime + time.process_time() - begin_cpu
        output.seek(0)
        return Run(seconds, cpu, usage.ru_maxrss * 1024, output.read())


def sync_tree(folder: Path) -> None:
    """Push every file and folder to the disk."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def compare(work: Path, size_gb: float, rounds: int, copiers: list[str]) -> list[Row]:
    """Alternate `convert` with ways to copy the same tree; a row for each."""
    source, out = work / "source", work / "out"
    run([*TREES, "gemma", str(source), "--size-gb", str(size_gb)])
    commands = {copier: [*copier.split(), str(source), str(out)] for copier in copiers}
    commands["gemma-fold convert"] = [
        *(*GEMMA_FOLD, "convert", str(source), "-o", str(out), "--json"),
    ]
    runs: dict[str, list[Run]] = {tool: [] for tool in commands}
    load = os.getloadavg()[0]
    for number in range(rounds):
        # Turn by turn, and neither always first: a shared disk changes speed as it likes.
        for tool in sorted(commands, reverse=number % 2 == 1):
            os.sync()
            done = run(commands[tool], out)
            runs[tool].append(done)
            print(f"{size_gb:g} GB, {tool}: {done.seconds:.2f} s", file=sys.stderr)
            shutil.rmtree(out)
    size = sum(path.stat().st_size for path in source.iterdir())
    case = f"{size_gb:g} GB in 8 shards, {file_system(work)}"
    rows = [row_of(case, tool, done) for tool, done in runs.items()]
    for row in rows:
        row.values.update(bytes=size, load_before=round(load, 1))
    moved = json.loads(runs["gemma-fold convert"][-1].stdout)["copied"]
    rows[-1].values.update({f"{how}_bytes": count for how, count in moved.items()})
    return rows


def row_of(case: str, tool: str, runs: list[Run]) -> Row:
    values = {
        "seconds": round(statistics.median(done.seconds for done in runs), 3),
        "seconds_repeats": [round(done.seconds, 3) for done in runs],
        "cpu_seconds": round(statistics.median(done.cpu_seconds for done in runs), 3),
        "peak_rss_mb": round(max(done.peak_rss for done in runs) / 1e6, 1),
    }
    return Row({"case": case}, tool, values)


def startup(work: Path, rounds: int) -> list[Row]:
    """What is waited for before anything is read, and while only headers are."""
    tree = work / "tree"
    run([*TREES, "qwen", str(tree)])
    size = sum(path.stat().st_size for path in tree.iterdir())
    commands = {
        "gemma-fold --help": ["--help"],
        f"gemma-fold inspect, 94 sparse shards, {size / 1e9:.0f} GB": ["inspect", str(tree)],
    }
    rows = []
    for case, arguments in commands.items():
        runs = [run([*GEMMA_FOLD, *arguments]) for _ in range(rounds)]
        rows.append(row_of(case, "gemma-fold", runs))
    return rows


@contextmanager
def image(work: Path, kind: str, size: int) -> Iterator[Path]:
    """A mounted, empty file system of the given kind in a sparse file."""
    path, folder = work / "image", work / "mount"
    folder.mkdir()
    with open(path, "wb") as file:
        file.truncate(size)
    subprocess.run([f"mkfs.{kind}", "-q", path], check=True)
    subprocess.run(["mount", "-o", "loop", path, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def file_system(folder: Path) -> str:
    """Its kind: ext4, xfs."""
    return output("df", "--output=fstype", str(folder)).split()[-1]


def machine(work: Path) -> Machine:
    """What the numbers depend on."""
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return Machine(
        models[0].partition(": ")[2] if models else platform.machine(),
        1,
        {
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
            "file_system": file_system(work),
            "kernel": platform.release(),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size-gb", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("/var/tmp"), help="where there is space")
    parser.add_argument("--reflink", choices=["xfs", "btrfs"])
    parser.add_argument("--startup", action="store_true")
    add_options(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        found_on = machine(work)
        if arguments.startup:
            rows = startup(work, arguments.rounds)
        elif arguments.reflink:
            copiers = ["cp -r --reflink=never", "cp -r --reflink=always"]
            with image(work, arguments.reflink, int(arguments.size_gb * 2.5e9)) as folder:
                rows = compare(folder, arguments.size_gb, arguments.rounds, copiers)
        else:
            rows = compare(work, arguments.size_gb, arguments.rounds, ["cp -r"])
    write(
        arguments,
        "convert",
        machine=found_on,
        versions={
            **versions("numpy", "huggingface_hub"),
            "cp": output("cp", "--version").splitlines()[0],
        },
        settings=Settings(),
        measures={**MEASURES, **MOVED},
        rows=rows,
    )
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
