"""`diff`: structure, then weights, then outputs, then the verdict."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from gemma_fold._version import __version__
from gemma_fold.checkpoint.progress import Progress
from gemma_fold.compare.outputs.results import Outputs
from gemma_fold.compare.outputs.server import Endpoint, is_url
from gemma_fold.compare.outputs.tokens import NothingInCommonError
from gemma_fold.compare.report.verdict import DiffLimits, DiffReport, SideInfo, judge
from gemma_fold.compare.sides import Side, open_headers, open_side
from gemma_fold.compare.structure import compare_structure
from gemma_fold.compare.weights.tensors import compare_weights
from gemma_fold.engines.mode import requested_mode
from gemma_fold.errors import CheckpointError, HostError, UnsupportedModelError, UsageError

Result = TypeVar("Result")

_SHOWN_PACKAGES = ("numpy",)
_SERVED = ("vllm", "sglang")  # the keys of outputs.engines.ENGINES, which imports torch
_ENGINES = ("transformers", *_SERVED)
_SHOWN_FOR_OUTPUTS = ("safetensors", "torch", *_ENGINES)


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """How to compare.

    Attributes:
        structure_only: read headers and configs and nothing else.
        outputs: run both sides; None means if that is possible.
        engines: what runs A and B: `transformers`, `vllm`, `sglang`, or the address of a server.
            Empty means transformers for both, one means the same for both.
        text: a file to read instead of the bundled text.
        context: tokens in a window.
        prompts: greedy continuations, at most four.
        new_tokens: of each continuation.
        dtype: `auto` (A's own), `float32`, `bfloat16` or `float16`, for both sides.
        device: `auto` (CUDA if there is one) or a torch device.
        noise_floor: run A twice, to know what its own noise is.
        save_logits: keep A's logits in this file.
        logits: read A's logits from this file instead of running A.
        timeout: seconds to wait for a server's answer.
        limits: what is tolerated.
    """

    structure_only: bool = False
    outputs: bool | None = None
    engines: tuple[str, ...] = ()
    text: Path | None = None
    context: int = 1024
    prompts: int = 4
    new_tokens: int = 32
    dtype: str = "auto"
    device: str = "auto"
    noise_floor: bool = True
    save_logits: Path | None = None
    logits: Path | None = None
    timeout: float = 120.0
    limits: DiffLimits = field(default_factory=DiffLimits)

    @property
    def asks_for_outputs(self) -> bool:
        """Whether they are wanted, rather than welcome: an option about them says so, too."""
        given = (self.outputs, self.engines, self.text, self.save_logits, self.logits)
        return any(given) or (self.dtype, self.device) != ("auto", "auto")


def diff(
    a: str, b: str, options: DiffOptions | None = None, progress: Progress | None = None
) -> DiffReport:
    """Compare A, the reference, with B; each a folder, a Hub id, or the address of a server.

    Raises:
        CheckpointError: a side is damaged, or not a checkpoint.
        UsageError: options that make no sense, or sides with nothing in common to compare.
        UnsupportedModelError: outputs were asked for, but transformers cannot run a side.
        HostError: memory, disk, a missing package, a server that is down or returns too
            little.
    """
    options, progress = options or DiffOptions(), progress or Progress()
    engines = _engines(a, b, options)
    _check(options, a, b, engines)
    open_one = open_headers if options.structure_only else open_side
    sides = [None if is_url(name) else open_one(name) for name in (a, b)]
    notes = [f"{side.name}: {side.note}" for side in sides if side and side.note]
    insists = not all(sides) or options.asks_for_outputs

    def attempt(step: Callable[[], Result]) -> Result | None:
        try:
            return step()
        except (NothingInCommonError, CheckpointError, UnsupportedModelError) as error:
            if insists:
                raise
            notes.append(f"outputs were not compared: {error}")
            return None

    wanted = options.outputs is not False and not options.structure_only
    missing = _missing(engines) if wanted else ""
    if missing and insists:
        raise HostError(f"comparing outputs needs {missing}")
    if missing:
        notes.append(f"outputs were not compared: that needs {missing}")
        wanted = False
    # Before the weights are read, which may take long, so that bad options are refused at once.
    job = attempt(lambda: _plan_outputs(sides, engines, options)) if wanted else None
    structure = weights = outputs = None
    if sides[0] and sides[1]:
        structure = compare_structure(sides[0], sides[1])
        if not options.structure_only:
            weights = compare_weights(sides[0], sides[1], progress)
    if job is not None:
        outputs = attempt(partial(job, progress))
    return DiffReport(
        a=_info(a, sides[0]),
        b=_info(b, sides[1]),
        structure=structure,
        weights=weights,
        outputs=outputs,
        notes=tuple(notes),
        limits=options.limits,
        verdict=judge(structure, weights, outputs, options.limits),
        environment=describe_environment(outputs),
    )


def _missing(engines: tuple[str, str]) -> str:
    """What is not installed that outputs need, and how to get it; empty if all is there."""
    extra = "transformers" if "transformers" in engines else "torch"
    for package in ("torch", extra):
        if importlib.util.find_spec(package) is None:
            return f"{package}: pip install 'gemma-fold[{extra}]'"
    return ""


def _engines(a: str, b: str, options: DiffOptions) -> tuple[str, str]:
    if len(options.engines) > 2:
        raise UsageError("--engine is for both sides, or once for A and once for B: at most two")
    given = options.engines or ("transformers",)
    for engine in given:
        if engine not in _ENGINES and not is_url(engine):
            raise UsageError(
                f"--engine {engine} is unknown; use {', '.join(_ENGINES)}, or the address of a "
                "server such as http://127.0.0.1:8000"
            )
    first, second = given[0], given[-1]
    return (a if is_url(a) else first, b if is_url(b) else second)


def _check(options: DiffOptions, a: str, b: str, engines: tuple[str, str]) -> None:
    if options.structure_only and (options.outputs or is_url(a) or is_url(b)):
        raise UsageError("--structure-only compares the headers of two checkpoints, nothing else")
    if options.outputs is False and (is_url(a) or is_url(b)):
        raise UsageError("a server can only be compared by its outputs; leave out --no-outputs")
    if any(e != "transformers" for e in engines) and (options.save_logits or options.logits):
        raise UsageError(
            "servers, vLLM and SGLang return no logits; "
            "--save-logits and --logits need transformers"
        )
    served = {*_SERVED} & {*engines}
    if served and options.device != "auto":
        raise UsageError(
            "--device is for transformers; "
            f"CUDA_VISIBLE_DEVICES chooses the GPUs of {' and '.join(sorted(served))}"
        )
    if options.save_logits and options.logits:
        raise UsageError("give --save-logits or --logits, not both")
    if options.outputs is False and (options.save_logits or options.logits):
        raise UsageError("--save-logits and --logits need outputs; leave out --no-outputs")
    if options.context < 2:
        raise UsageError(f"--context {options.context} is too short; two tokens are the least")
    if options.save_logits is not None:
        check_writable(options.save_logits, "--save-logits", _is_logits)


def check_writable(path: Path, option: str, is_ours: Callable[[Path], bool]) -> None:
    """UsageError unless `path` can be written without the loss of a file that is not `is_ours`."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: {path.parent} does not exist; make it first")
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; give a file name")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {path} is no file; give a file name")
    if path.is_file() and not is_ours(path):
        raise UsageError(
            f"{option} {path} is there and was not written by diff or check; name another file"
        )


def _is_logits(path: Path) -> bool:
    """Whether a file may be one that `--save-logits` wrote."""
    with open(path, "rb") as file:
        return b"gemma_fold.diff" in file.read(1 << 20) or path.stat().st_size == 0


def _plan_outputs(
    sides: list[Side | None], engines: tuple[str, str], options: DiffOptions
) -> Callable[[Progress], Outputs]:
    # Torch is imported from here on, and only here.
    from gemma_fold.compare.outputs.backend import EngineSide
    from gemma_fold.compare.outputs.engines import ENGINES
    from gemma_fold.compare.outputs.logits import Settings, compare_full, open_logits
    from gemma_fold.compare.outputs.tokens import make_tokens
    from gemma_fold.compare.outputs.top_k import compare_top
    from gemma_fold.compare.outputs.transformers import DTYPES, import_transformers, pick_device

    if options.dtype not in DTYPES:
        raise UsageError(f"--dtype {options.dtype} is unknown; use one of {', '.join(DTYPES)}")
    if "transformers" in engines:
        import_transformers()
    served = [engine for engine in ENGINES if engine in engines]
    if served:
        requested_mode()  # an error here, rather than in a process of an engine
    for engine in served:
        ENGINES[engine].prepare()
    settings = Settings(
        options.dtype,
        pick_device(options.device),
        options.new_tokens,
        options.noise_floor,
        options.save_logits,
    )
    tokens = None
    if any(sides):
        room = 1 if served else 0  # an engine continues what it reads by a token
        tokens = make_tokens(
            sides[0], sides[1], options.text, options.context, options.prompts, room
        )

    def party(side: Side | None, engine: str) -> Side | Endpoint | EngineSide:
        if is_url(engine):
            return Endpoint(engine, options.timeout)
        assert side is not None
        return EngineSide(side, engine) if engine in ENGINES else side

    one, two = map(party, sides, engines)
    if isinstance(one, Side) and isinstance(two, Side) and tokens:
        if options.logits:
            kept = open_logits(options.logits, one, tokens, options.dtype)
            settings = replace(settings, logits=kept)
        return partial(compare_full, one, two, tokens, settings)
    return partial(compare_top, one, two, tokens, options.text, options.prompts, settings)


def _info(name: str, side: Side | None) -> SideInfo:
    if side is None:
        return SideInfo(name)
    return SideInfo(name, side.folded, str(side.config.get("model_type")), side.commit)


def describe_environment(outputs: Outputs | None = None) -> dict[str, str]:
    """When and with what a report was made."""
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "gemma_fold": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for package in (*_SHOWN_PACKAGES, *(_SHOWN_FOR_OUTPUTS if outputs else ())):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if outputs:
        import torch

        found["threads"] = str(torch.get_num_threads())
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found
