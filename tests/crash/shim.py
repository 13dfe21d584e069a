"""Build shim.c, and steer it from inside a process that it was preloaded into."""

from __future__ import annotations

import ctypes
import errno
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")

# As in shim.c: what a call does, what is done to it, and how the shim behaves.
CHANGES, ALLOCATES, INTERRUPTS, MOVES = 1, 2, 4, 8
NONE, KILL, TORN, SHORT, ERROR, LATE = range(6)
NO_EXCHANGE, NO_RENAMEAT2, SKIP_SYNC = 1, 2, 4


@dataclass(frozen=True)
class Fault:
    """What happens to a call.

    Attributes:
        name: as it is listed.
        kind: one of KILL and its like.
        code: the errno it answers with.
        needs: bits that a call must have for the fault to make sense.
        sticky: whether every later call that has those bits fails as well.
        harmless: whether the command must finish its work as if nothing had happened.
    """

    name: str
    kind: int
    code: int = 0
    needs: int = 0
    sticky: bool = False
    harmless: bool = False

    def fits(self, bits: int) -> bool:
        """Whether it makes sense for a call with these bits."""
        return bits & self.needs == self.needs


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("kill", KILL),
        Fault("kill after half a write", TORN, needs=CHANGES | MOVES),
        Fault("short write", SHORT, needs=CHANGES | MOVES, harmless=True),
        Fault("EINTR", ERROR, errno.EINTR, needs=INTERRUPTS, harmless=True),
        Fault("ENOSPC", ERROR, errno.ENOSPC, needs=ALLOCATES),
        Fault("EDQUOT", ERROR, errno.EDQUOT, needs=ALLOCATES),
        Fault("EIO", ERROR, errno.EIO),
        Fault("EIO afterwards", LATE, errno.EIO, needs=CHANGES),
        Fault("ENOSPC from there on", ERROR, errno.ENOSPC, CHANGES | ALLOCATES, sticky=True),
        Fault("EIO from there on", ERROR, errno.EIO, sticky=True),
    )
}


@dataclass(frozen=True)
class Call:
    """A file system call of a run, in the order they were made."""

    name: str
    bits: int
    path: str


class Control(ctypes.Structure):
    """The control block of shim.c, shared with forked children."""

    _fields_ = (
        ("root", ctypes.c_char * 1024),
        ("at", ctypes.c_long),
        ("count", ctypes.c_long),
        ("fault", ctypes.c_int),
        ("code", ctypes.c_int),
        ("needs", ctypes.c_int),
        ("sticky", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("fired", ctypes.c_int),
        ("fired_name", ctypes.c_char * 32),
        ("fired_path", ctypes.c_char * 1024),
        ("log_length", ctypes.c_long),
        ("log", ctypes.c_char * (1 << 20)),
    )

    def arm(self, root: Path, at: int, fault: Fault | None, flags: int) -> None:
        """Watch the calls below `root`: log them if `at` is 0, or give `fault` from `at` on."""
        self.at, self.count, self.fired, self.log_length = at, 0, 0, 0
        self.fired_name = self.fired_path = b""
        self.fault, self.code, self.needs, self.sticky = (
            (fault.kind, fault.code, fault.needs, fault.sticky) if fault else (NONE, 0, 0, False)
        )
        self.flags = flags
        self.root = bytes(root)

    def given(self) -> Call | None:
        """The call that had the fault, if any did."""
        if not self.fired:
            return None
        return Call(self.fired_name.decode(), 0, self.fired_path.decode())

    def disarm(self) -> None:
        self.root, self.flags = b"", 0

    def calls(self) -> list[Call]:
        """What the last run that was only logged did."""
        log = ctypes.string_at(ctypes.addressof(self) + Control.log.offset, self.log_length)
        parts = (line.split("\t", 2) for line in log.decode().splitlines())
        return [Call(name, int(bits), path) for name, bits, path in parts]


def control() -> Control:
    """The control block of this process; AttributeError where the shim is not preloaded."""
    function = ctypes.CDLL(None).shim_control
    function.restype = ctypes.POINTER(Control)
    block = function().contents
    assert isinstance(block, Control)
    return block


def compiler() -> str | None:
    """A C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def build(target: Path) -> Path:
    """Compile shim.c into `target`."""
    command = [str(compiler()), "-Wall", "-Wextra", "-O1", "-shared", "-fPIC", "-o", str(target)]
    subprocess.run([*command, str(SOURCE), "-ldl"], check=True)
    return target
