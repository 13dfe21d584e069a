"""`doctor`: which engines are here, and what would be fused in a model on this machine."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from gemma_fold._version import __version__
from gemma_fold.checkpoint.locate import hub_id
from gemma_fold.checkpoint.source import CONFIG, parse_json_object, read_small
from gemma_fold.engines.attach.handed import block_problem, methods_in
from gemma_fold.engines.checks import TESTED, native_config, numbers, plugin_problem
from gemma_fold.engines.known_code import SGLANG, VLLM, Family
from gemma_fold.engines.mode import VALUES, VARIABLE, Missing, Report, requested
from gemma_fold.errors import (
    CheckpointError,
    HostError,
    NothingToFoldError,
    UnsupportedModelError,
    first_line,
)

#: built: the model was built without weights. read: the engine's source was.
Level = Literal["built", "read"]


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine on this machine.

    Attributes:
        version: None if it is not installed.
        tested: the first and the last version that were checked.
        plugin: whether it finds gemma-fold by itself; None for transformers, which has no plug-ins.
    """

    name: str
    version: str | None
    tested: tuple[str, str]
    plugin: bool | None = None

    @property
    def as_tested(self) -> bool:
        low, high = map(numbers, self.tested)
        return low <= numbers(self.version or "")[: len(high)] <= high


@dataclass(frozen=True, slots=True)
class Outlook:
    """What an engine would do with a model.

    Attributes:
        report: what would be fused, or None if that is not known.
        note: why it is not, or what else there is to know.
    """

    engine: str
    level: Level
    report: Report | None = None
    note: str = ""

    @property
    def complete(self) -> bool:
        return self.report is None or self.report.complete


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is on this machine; `outlooks` is what each engine would do with `model`."""

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

    Args:
        model: a folder or a Hub id, of an original or a folded checkpoint; of a Hub id only the
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
            outlook(engine.name, config) for engine in engines if engine.version is not None
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
        variable = f"{engine.name.upper()}_PLUGINS"
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
    found = installed(name)
    plugin = None if name == "transformers" or found is None else not plugin_problem(name)
    return Engine(name, found, TESTED[name], plugin)


def _config(name: str) -> Mapping[str, Any]:
    folder, found = Path(name), hub_id(name)
    file = folder / CONFIG
    if found is not None:
        file = _fetched(*found)
    elif not file.is_file():
        problem = f"has no {CONFIG}" if folder.is_dir() else "is not a folder"
        raise CheckpointError(f"{name} {problem}; give the folder of a checkpoint, or a Hub id")
    return native_config(parse_json_object(read_small(file), file), str(file.parent))


def _fetched(repo: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, CONFIG, revision=revision))
    except (OSError, ValueError) as error:  # of any kind: the network, the name, a missing file
        raise HostError(f"cannot fetch {CONFIG} of {repo}: {first_line(error)}") from error


def _gpu(index: int) -> str:
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def outlook(engine: str, config: Mapping[str, Any]) -> Outlook:
    """What an installed engine would fuse in a model, found out without loading a weight.

    transformers builds the model without memory, and it is folded there. The sources of vLLM and
    SGLang are read where they are installed, and their forwards run on stand-ins: neither is
    imported, because that takes a GPU for some of their versions, and long for all.

    Args:
        engine: one of :data:`TESTED`.
        config: the original's.

    Raises:
        UnsupportedModelError: transformers does not know the model, or there is nothing to fold.
    """
    if engine == "transformers":
        return _in_transformers(config)
    return _in_server(engine, config)


def _in_transformers(config: Mapping[str, Any]) -> Outlook:
    """The model built without memory, and folded there."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from gemma_fold.engines.transformers.layers import fuse_layers
    from gemma_fold.engines.transformers.norms import FoldedNorm
    from gemma_fold.engines.transformers.weights import report, zero_centred_norms

    oldest = TESTED["transformers"][0]
    if numbers(transformers.__version__) < numbers(oldest):
        return Outlook("transformers", "built", note=f"too old, folded checkpoints need {oldest}")
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know the model type {model_type}; "
            "upgrade it"
        )
    cls = getattr(transformers, str((config.get("architectures") or ["AutoModel"])[0]), None)
    built = CONFIG_MAPPING[model_type].from_dict(dict(config))
    with torch.device("meta"):
        make = getattr(cls or transformers.AutoModel, "_from_config", None)
        model: Any = make(built) if make else transformers.AutoModel.from_config(built)
    norms = [FoldedNorm.adopt(norm, fold) for norm, fold in zero_centred_norms(model)]
    if not norms:
        raise NothingToFoldError(
            f"{model_type} has no zero-centred norm, so there is nothing to do"
        )
    return Outlook("transformers", "built", report(len(norms), fuse_layers(model)))


#: By engine: its decoders, the folder of its models, and what it means that a model is unknown.
_SERVERS: dict[str, tuple[tuple[Family, ...], str, str]] = {
    "vllm": (VLLM, "model_executor/models", "native mode does not know this model: stock kernels"),
    "sglang": (SGLANG, "srt/models", "this model has no sandwiches there"),
}


def _in_server(engine: str, config: Mapping[str, Any]) -> Outlook:
    """What native mode would do, by the source of the installed engine."""
    families, models, unknown = _SERVERS[engine]
    family = next((one for one in families if one.model_type == _text_type(config)), None)
    if family is None:
        return Outlook(engine, "read", note=unknown)
    file = _source(engine, f"{models}/{family.module}.py")
    if not file.is_file():
        return Outlook(engine, "read", note=f"this version has no {family.module}")
    model, layer = methods_in(file, family.model), methods_in(file, family.layer)
    if "forward" not in model or "forward" not in layer:
        return Outlook(engine, "read", note="its forwards are inherited; they are checked at load")
    problem = family.model_problem(model) or family.layer_problem(layer)
    layers = int(_text_config(config).get("num_hidden_layers", 0))
    pairs = layers * 2 if family.layout == "sandwich" else 0
    if problem and not pairs:
        return Outlook(engine, "read", note=f"its norms would be stock: {problem}")
    missing = (Missing(problem, "", "norm by norm", layers),) if problem else ()
    fused = 0 if problem else pairs
    report = Report(f"{engine} {installed(engine)}", 0, fused, pairs, missing)
    return Outlook(engine, "read", report, _sums(file, family) if engine == "sglang" else "")


def _sums(file: Path, family: Family) -> str:
    """Why SGLang's all-reduces would stay its own; empty if they would not."""
    begin = family.layer.removesuffix("DecoderLayer")
    for block, projection in (("Attention", "o_proj"), ("MLP", "down_proj")):
        problem = block_problem(methods_in(file, begin + block), projection)
        if problem:
            return f"all-reduces would stay SGLang's: {begin}{block}: {problem}"
    return ""


def installed(engine: str) -> str | None:
    """The version of an engine here, or None. A package without metadata is not the engine."""
    if importlib.util.find_spec(engine) is None:
        return None
    for name in (engine, f"{engine}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _source(engine: str, path: str) -> Path:
    spec = importlib.util.find_spec(engine)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0] if places else ".", path)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _text_type(config: Mapping[str, Any]) -> str:
    return str(_text_config(config).get("model_type", config.get("model_type"))).removesuffix(
        "_text"
    )
