"""An engine in a process of its own, run by the Python that it is installed in; a pipe to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # vLLM is sent functions and tensors
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its modules are in the process that looks at them
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
#: By mode. `separate`: the norms of q and k are modules of their own, to be looked at.
MODES = {
    "native": {"GEMMA_FOLD": "native", "GEMMA_FOLD_QK": "separate"},
    "stock": {"VLLM_PLUGINS": "", "SGLANG_PLUGINS": "none"},
}


class Rollout:
    """The other end of the pipe: calls go to an object of the same methods."""

    def __init__(self, pipe: Connection, log: Path) -> None:
        self._pipe = pipe
        self._log = log

    def call(self, method: str, *args: Any) -> Any:
        """What the method gives there.

        Raises:
            RuntimeError: the engine ended; with the end of its log.
        """
        try:
            self._pipe.send((method, args))
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            last = self._log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{last}\nthe engine ended; its log ends above") from error


@contextmanager
def running(engine: str, mode: str, python: str, model: Path, folder: Path) -> Iterator[Rollout]:
    """An engine that serves `model`; its hooks write into `folder`."""
    ours, theirs = Pipe()
    log = folder / f"{engine}-{mode}.log"
    paths = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH")]))
    env = {k: v for k, v in os.environ.items() if not k.startswith("GEMMA_FOLD")}
    with log.open("w") as output:
        process = subprocess.Popen(
            [python, HERE / f"serve_{engine}.py", str(theirs.fileno()), str(model), str(folder)],
            env={**env, **ENVIRONMENT, **MODES[mode], "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    theirs.close()
    try:
        yield Rollout(ours, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the engine's own processes, too
        process.wait()


def answer(make: Callable[[str, Path], Any]) -> None:
    """In the engine's process: make it, and do what comes through the pipe until it is closed."""
    pipe = Connection(int(sys.argv[1]))
    engine = make(sys.argv[2], Path(sys.argv[3]))
    with suppress(EOFError):
        while True:
            method, args = pipe.recv()
            pipe.send(getattr(engine, method)(*args))
