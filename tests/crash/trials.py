"""One trial: run a command with one call failing, judge what is there, let the next run finish."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from crash.scenes import OUT, WORK, Scene, Yard
from crash.shim import CHANGES, KILL, TORN, Call, Control, Fault
from crash.trees import Tree, difference, tree

TIMEOUT = 20
CRASHED = 70
Runner = Callable[[tuple[str, ...]], int]


@dataclass(frozen=True)
class Ending:
    """How a run ended: its exit code, or minus the signal that killed it, and all it printed."""

    code: int
    text: str


@dataclass
class Trial:
    """What one trial found."""

    scene: str
    fault: str
    number: int
    call: Call | None = None
    code: int = 0
    state: str = ""
    left: bool = False
    text: str = ""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        call = f"{self.call.name} {self.call.path}" if self.call else "none"
        where = f"{self.scene}: {self.fault} at call {self.number}, {call}"
        return f"{where}: {'; '.join(self.problems)}"


class Bench:
    """Runs commands of `runner` in forked children, in one yard."""

    def __init__(self, yard: Yard, control: Control, runner: Runner, *, flags: int) -> None:
        self.yard = yard
        self.references: dict[str, Tree] = {}
        self._control = control
        self._runner = runner
        self._flags = flags
        self._output = os.memfd_create("output")
        gc.freeze()

    def run(
        self, arguments: tuple[str, ...], *, at: int = 0, fault: Fault | None = None, flags: int = 0
    ) -> Ending:
        """Run a command in a child, its call number `at` with `fault`; 0 logs all calls."""
        os.ftruncate(self._output, 0)
        os.lseek(self._output, 0, os.SEEK_SET)
        self._control.arm(self.yard.folder, at, fault, flags | self._flags)
        child = os.fork()
        if child == 0:
            _be_child(self._runner, arguments, self._output)
        _, status = os.waitpid(child, 0)
        self._control.disarm()
        text = os.pread(self._output, 1 << 16, 0).decode(errors="replace")
        return Ending(os.waitstatus_to_exitcode(status), text)

    def prepare(self, scene: Scene) -> None:
        """Bring the yard into the state that the scene begins in."""
        self.yard.clean(old=scene.old)
        if scene.begun is None:
            return
        arguments, choose = scene.begun
        self.run(arguments, flags=scene.flags)
        number = choose(self._control.calls())
        self.yard.clean(old=scene.old)
        killed = self.run(arguments, at=number, fault=Fault("kill", KILL), flags=scene.flags)
        assert killed.code == -signal.SIGKILL, (scene.name, killed)
        assert (self.yard.folder / WORK).is_dir(), f"{scene.name}: no work folder was left"

    def calls(self, scene: Scene) -> list[Call]:
        """The calls of the undisturbed command."""
        self.prepare(scene)
        ending = self.run(scene.arguments, flags=scene.flags)
        calls = self._control.calls()
        problems = self._unfinished(scene, ending)
        assert not problems, f"{scene.name} undisturbed: {problems}: {ending.text}"
        return calls

    def trial(self, scene: Scene, number: int, fault: Fault) -> Trial:
        """Fail one call and judge; then let the command that follows finish the work."""
        self.prepare(scene)
        ending = self.run(scene.arguments, at=number, fault=fault, flags=scene.flags)
        trial = Trial(scene.name, fault.name, number, self._control.given(), ending.code)
        trial.state, trial.text = self._state(), ending.text
        trial.left = (self.yard.folder / WORK).exists()
        trial.problems += self._judge(scene, fault, trial)
        if trial.left or trial.state != "new":
            arguments = scene.again if trial.left and scene.again else scene.arguments
            then = self.run(arguments, at=-1, flags=scene.flags)
            problems = self._unfinished(scene, then)
            if trial.state == "new" and problems == ["exit code 2"]:
                problems = []  # it was complete before: there was nothing to continue
            trial.problems += [f"then {' '.join(arguments)}: {p}" for p in problems]
            if problems:
                trial.problems.append(f"it said {then.text.strip()!r}")
        return trial

    def _state(self) -> str:
        out = self.yard.folder / OUT
        if not out.exists() and not out.is_symlink():
            return "absent"
        found = tree(out)
        for name, wanted in self.references.items():
            if found == wanted:
                return name
        return "broken: " + difference(found, self.references["new"])

    def _judge(self, scene: Scene, fault: Fault, trial: Trial) -> list[str]:
        problems = self._strayed()
        if not self._acceptable(scene, trial):
            problems.append(f"OUT is {trial.state}")
        if trial.call is None:  # a run with fewer calls than the one before, by its threads
            problems += [f"undisturbed, but {trial.code}"] if trial.code else []
        elif fault.kind in (KILL, TORN):
            if trial.code != -signal.SIGKILL:
                problems.append(f"not killed but {trial.code}")
        elif trial.code == 0:
            problems += self._wrongly_content(fault, trial)
        elif fault.harmless:
            problems.append(f"gave up with {trial.code} for no reason: {trial.text.strip()!r}")
        else:
            problems += self._complaint(trial)
        return problems

    def _wrongly_content(self, fault: Fault, trial: Trial) -> list[str]:
        """Success must be one, and what is left or was not synced must be said."""
        problems = []
        if trial.state != "new":
            problems.append(f"exit code 0, but OUT is {trial.state}")
        if trial.left and WORK not in trial.text:
            problems.append(f"exit code 0 without a word, but {WORK} is left")
        synced = trial.call is not None and trial.call.name in ("fsync", "fdatasync")
        if synced and not fault.harmless and not self._reported(trial, fault):
            problems.append("exit code 0 without a word, but a sync failed")
        return problems

    def _acceptable(self, scene: Scene, trial: Trial) -> bool:
        if trial.state == "absent" and scene.absent:
            return self._old_is_kept()
        return trial.state in {"new", "old" if scene.old else "absent"}

    def _complaint(self, trial: Trial) -> list[str]:
        """An error is one line on stderr and exit code 2."""
        text = trial.text.strip()
        problems = [f"exit code {trial.code}"] if trial.code != 2 else []
        if not text.startswith("gemma-fold: ") or "\n" in text:
            problems.append(f"not one line: {text[-400:]!r}")
        return problems

    def _reported(self, trial: Trial, fault: Fault) -> bool:
        """Whether a success that leaves something undone says so."""
        return os.strerror(fault.code) in trial.text

    def _old_is_kept(self) -> bool:
        kept = self.yard.folder / WORK / "old"
        return kept.is_dir() and tree(kept) == self.references["old"]

    def _strayed(self) -> list[str]:
        rest = self.yard.stray()
        if rest == self.yard.rest:
            return []
        return ["outside of OUT: " + difference(rest, self.yard.rest)]

    def _unfinished(self, scene: Scene, ending: Ending) -> list[str]:
        problems = self._strayed()
        if ending.code != 0:
            problems.append(f"exit code {ending.code}")
        state = self._state()
        if state != "new":
            problems.append(f"OUT is {state}")
        if (self.yard.folder / WORK).exists():
            problems.append(f"{WORK} is left")
        return problems


def _be_child(runner: Runner, arguments: tuple[str, ...], output: int) -> None:
    code = CRASHED
    try:
        signal.alarm(TIMEOUT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = runner(arguments)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fitting(calls: list[Call], fault: Fault, every: int) -> list[int]:
    """Numbers of the calls that get `fault`.

    All those it makes sense for that change something or sync, and each `every`-th of those that
    only look: before and after these the disk is the same.
    """
    found = [(number, call) for number, call in enumerate(calls, 1) if fault.fits(call.bits)]
    acting = [number for number, call in found if call.bits & CHANGES or "sync" in call.name]
    looking = [number for number, _ in found if number not in set(acting)]
    return sorted({*acting, *looking[::every]})
