"""`doctor`: which engines are here, and what would be fused in a model on this machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from gemma_fold._version import __version__
from gemma_fold.checkpoint.hub import looks_like_hub_id, parse_hub_id
from gemma_fold.checkpoint.source import CONFIG
from gemma_fold.engines.attach import outlook
from gemma_fold.engines.attach.outlook import TESTED, Outlook, numbers
from gemma_fold.engines.checks import native_config
from gemma_fold.engines.mode import VALUES, VARIABLE, requested
from gemma_fold.errors import CheckpointError, HostError

#: Entry points by which an engine finds gemma-fold, and the variable that can leave it out.
_PLUGINS = {
    "vllm": ("vllm.general_plugins", "VLLM_PLUGINS"),
    "sglang": ("sglang.srt.plugins", "SGLANG_PLUGINS"),
}


@dataclass(frozen=True, slots=True)
class Engine:
    """version: None where it is not installed. plugin: whether it finds gemma-fold by itself, and
    for transformers, which has to be told, None."""

    name: str
    version: str | None
    tested: tuple[str, str]
    plugin: bool | None = None

    @property
    def as_tested(self) -> bool:
        low, high = map(numbers, self.tested)
        return low <= numbers(self.version or "")[: len(high)] <= high


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is on this machine; `outlooks` say what each engine would do with `model`."""

    gemma_fold: str
    python: str
    torch: str
    triton: str | None
    gpus: tuple[str, ...]
    mode: str
    engines: tuple[Engine, ...]
    model: str | None = None
    outlooks: tuple[Outlook, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every installed engine finds gemma-fold and would fuse all there is to fuse."""
        found = [engine for engine in self.engines if engine.version is not None]
        return (
            all(engine.plugin is not False for engine in found)
            and all(one.complete for one in self.outlooks)
            and (self.model is None or bool(found))
        )


def diagnose(model: str | os.PathLike[str] | None = None) -> Diagnosis:
    """Look at the engines installed here and, without loading weights, at what they would fuse.

    `model` is a folder or a Hub id, of an original or a folded checkpoint; of a Hub id only the
    config is fetched.

    Raises:
        CheckpointError: no config, or a damaged one.
        UnsupportedModelError: nothing in the model can be folded, or it is not known.
        HostError: the Hub does not answer.
    """
    import torch

    mode = requested(VARIABLE, VALUES) or ""
    engines = tuple(_engine(name) for name in TESTED)
    outlooks: tuple[Outlook, ...] = ()
    if model is not None:
        config = _config(os.fspath(model))
        outlooks = tuple(
            outlook.ENGINES[engine.name](config) for engine in engines if engine.version is not None
        )
    return Diagnosis(
        __version__,
        platform.python_version(),
        str(torch.__version__),
        _version("triton"),
        tuple(_gpu(index) for index in range(torch.cuda.device_count())),
        mode,
        engines,
        None if model is None else os.fspath(model),
        outlooks,
    )


def to_json(found: Diagnosis) -> dict[str, Any]:
    """For `--json`: the fields of :class:`Diagnosis` under their names, and `ok`."""
    plain = asdict(found)
    for engine, one in zip(plain["engines"], found.engines, strict=True):
        engine["as_tested"] = one.version is not None and one.as_tested
    return {"ok": found.ok, **plain}


def text(found: Diagnosis) -> str:
    """For people: a line for each thing."""
    lines = [
        f"gemma-fold {found.gemma_fold}, Python {found.python}, torch {found.torch}, "
        f"Triton {found.triton or 'not installed'}",
        f"GPU: {', '.join(found.gpus) or 'none'}",
        f"GEMMA_FOLD: {found.mode or 'not set'}",
        *(_engine_line(engine) for engine in found.engines),
    ]
    if found.model is not None:
        lines.append(f"{found.model}:")
        lines += [f"  {_outlook_line(one)}" for one in found.outlooks]
        if not found.outlooks:
            lines.append("  no engine is installed; pip install 'gemma-fold[transformers]'")
    return "\n".join(lines)


def _engine_line(engine: Engine) -> str:
    tested = f"checked with {engine.tested[0]} to {engine.tested[1]}"
    if engine.version is None:
        return f"{engine.name}: not installed ({tested})"
    line = f"{engine.name} {engine.version}: {tested}"
    if not engine.as_tested:
        line += ", not with this one"
    if engine.plugin is False:
        _, variable = _PLUGINS[engine.name]
        line += f"; it does not find gemma-fold: install it beside, and see {variable}"
    return line


def _outlook_line(one: Outlook) -> str:
    how = "built without weights" if one.level == "built" else "its source read, not run"
    if one.report is None:
        return f"{one.engine}: {one.note} ({how})"
    report = one.report
    counts = [f"{report.norms} norms folded"] if report.norms else []
    if report.sandwiches:
        counts.append(f"{report.fused} of {report.sandwiches} sandwiches fused")
    reasons = [*map(str, report.missing), *([one.note] if one.note else [])]
    what = ", ".join(counts) or "every norm by itself, nothing to fuse"
    return "; ".join([f"{report.engine}: {what} ({how})", *reasons])


def _engine(name: str) -> Engine:
    plugin = None
    found = outlook.installed(name)
    if name in _PLUGINS and found is not None:
        group, variable = _PLUGINS[name]
        allowed = [one.strip() for one in os.environ.get(variable, "").split(",") if one.strip()]
        there = any(one.name == "gemma_fold" for one in entry_points(group=group))
        plugin = there and (not allowed or "gemma_fold" in allowed)
    return Engine(name, found, TESTED[name], plugin)


def _config(name: str) -> Mapping[str, Any]:
    folder = Path(name)
    file = folder / CONFIG
    if not folder.exists() and looks_like_hub_id(name):
        file = _fetched(name)
    elif not file.is_file():
        problem = f"has no {CONFIG}" if folder.is_dir() else "is no folder"
        raise CheckpointError(f"{name} {problem}; give the folder of a checkpoint, or a Hub id")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds no JSON object; fetch it again")
    return native_config(config, str(file.parent))


def _fetched(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    repo, revision = parse_hub_id(name)
    try:
        return Path(hf_hub_download(repo, CONFIG, revision=revision))
    except (OSError, ValueError) as error:  # of any kind: the network, the name, a missing file
        reason = str(error).strip().partition("\n")[0]
        raise HostError(f"cannot fetch {CONFIG} of {name}: {reason}") from error


def _gpu(index: int) -> str:
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
