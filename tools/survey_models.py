"""Build every model of the installed transformers, and try each of its norms."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import norm_trial
import torch
import transformers
from norm_trial import Trial
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

#: A model of a default config that takes longer to lay out is not built.
SECONDS = 90
ROOT = Path(str(transformers.__file__)).parent
TESTS = Path(__file__).resolve().parent.parent / "tests"
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class ClassFound:
    """A class of a modeling file that has a 1-D parameter, and what it does with it."""

    name: str
    file: str
    line: int
    parameter: str
    trial: Trial


@dataclass(slots=True)
class Sweep:
    """What became of every model type.

    Attributes:
        executed: model types of which every norm ran and none adds to its weight.
        zero_centred: model type -> its norm classes that do.
        not_built: model type -> why.
        not_run: model type -> classes with a 1-D parameter that cannot be called alone.
    """

    executed: set[str] = field(default_factory=set)
    zero_centred: dict[str, set[str]] = field(default_factory=dict)
    not_built: dict[str, str] = field(default_factory=dict)
    not_run: dict[str, set[str]] = field(default_factory=dict)


class _TookTooLongError(Exception):
    pass


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TookTooLongError(f"not laid out within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@cache
def modeling_modules() -> tuple[tuple[ModuleType, ...], dict[str, str]]:
    """Every modeling module, and those that cannot be imported with the reason."""
    found, failed = [], {}
    models = importlib.import_module("transformers.models")
    for package in pkgutil.iter_modules(models.__path__):
        folder = Path(models.__path__[0]) / package.name
        for path in sorted(folder.glob("modeling_*.py")):
            name = f"transformers.models.{package.name}.{path.stem}"
            try:
                found.append(importlib.import_module(name))
            except Exception as error:  # a package that is not installed, most often
                failed[path.stem] = str(error).splitlines()[0]
    return tuple(found), failed


def norm_classes() -> Iterator[ClassFound]:
    """Every class that a width is enough to build, with one 1-D parameter that ran."""
    for module in modeling_modules()[0]:
        for cls in vars(module).values():
            if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
                continue
            if cls.__module__ != module.__name__ or issubclass(cls, PreTrainedModel):
                continue
            instance = norm_trial.built(cls)
            if instance is None:
                continue
            for name, _ in norm_trial.parameters(instance):
                trial = norm_trial.tried(instance, name)
                if trial is not None:
                    yield ClassFound(cls.__name__, *_place(cls), name, trial)


def _place(cls: type) -> tuple[str, int]:
    file = Path(inspect.getsourcefile(cls) or "")
    return str(file.relative_to(ROOT)), inspect.getsourcelines(cls)[1]


def model_classes(config_class: type) -> tuple[type[Any], ...]:
    """Every class of transformers that is built from this config."""
    name = config_class.__module__.replace("configuration_", "modeling_")
    module = next((m for m in modeling_modules()[0] if m.__name__ == name), None)
    found = [
        cls
        for cls in vars(module or object).values()
        if isinstance(cls, type)
        and issubclass(cls, PreTrainedModel)
        and getattr(cls, "config_class", None) is config_class
        and not cls.__name__.endswith("PreTrainedModel")
    ]
    if not found and config_class in MODEL_MAPPING:  # it runs the classes of another config
        found = [MODEL_MAPPING[config_class]]
    return tuple(found)


def wrappers() -> set[str]:
    """Model types whose config has the config of any model inside."""
    found = set()
    for model_type, config in CONFIG_MAPPING.items():
        inside = getattr(config, "sub_configs", {}).values()
        if AutoConfig in inside or "CONFIG_MAPPING[" in inspect.getsource(config):
            found.add(model_type)
    return found


def sweep(report: Any = lambda line: None) -> Sweep:
    """Lay out a model of every class of every model type, and try all that has a 1-D parameter."""
    found = Sweep()
    inside: dict[str, list[nn.Module]] = {}
    for model_type in sorted(CONFIG_MAPPING.keys()):
        built = 0
        reasons = ["no class is built from its config alone"]
        for cls in model_classes(CONFIG_MAPPING[model_type]):
            try:
                with _within(SECONDS), torch.device("meta"):
                    model = cls(CONFIG_MAPPING[model_type]())
            except Exception as error:
                reasons.append(f"{cls.__name__}: {type(error).__name__}: {error}".splitlines()[0])
                continue
            built += 1
            _try_norms(model_type, model, found)
            for module in model.modules():
                kind = getattr(getattr(module, "config", None), "model_type", None)
                if kind and kind != model_type:
                    inside.setdefault(kind, []).append(module)
        if not built:
            found.not_built[model_type] = reasons[-1]
        report(f"{model_type}: {built} built {reasons[-1] if not built else ''}")
        for kind, modules in inside.items():
            for module in modules:
                _try_norms(kind, module, found)
        inside.clear()
    for kind in found.executed:
        found.not_built.pop(kind, None)
    return found


_seen: dict[tuple[type, str], Trial | None] = {}


def _try_norms(model_type: str, model: nn.Module, found: Sweep) -> None:
    found.executed.add(model_type)
    for module in model.modules():
        cls = type(module)
        for name, _ in norm_trial.parameters(module):
            key = (cls, name)
            if key not in _seen:
                _seen[key] = norm_trial.tried(module, name)
            trial = _seen[key]
            if trial is None:
                found.not_run.setdefault(model_type, set()).add(f"{cls.__name__}.{name}")
            elif trial.verdict in ("zero_centred", "input_scaled"):
                found.zero_centred.setdefault(model_type, set()).add(cls.__name__)


# --- names on disk -------------------------------------------------------------------------------


def measured_names() -> dict[str, dict[str, list[str]]]:
    """Norms of the families that are described small, by the names that `save_pretrained` wrote."""
    transformers.utils.logging.disable_progress_bar()
    sys.path[:0] = [str(TESTS), str(TESTS / "support")]
    families = importlib.import_module("families")
    return {family: names_of(family) for family in families.FAMILIES}


def names_of(family: str) -> dict[str, list[str]]:
    """What `tests/data/norms.json` says of a family: names by what the module does with them."""
    families = importlib.import_module("families")
    found: dict[str, set[str]] = {"zero_centred": set(), "plain": set(), "input_scaled": set()}
    for cls in families.model_classes(family):
        model = families.build(family, torch.float32, cls)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            stored = {
                tuple(tensor.tolist()): name
                for file in Path(folder).glob("*.safetensors")
                for name, tensor in load_file(file).items()
                if tensor.dim() == 1
            }
        for module in model.modules():
            for name, parameter in norm_trial.parameters(module):
                trial = norm_trial.tried(module, name)
                if trial and trial.verdict in found and tuple(parameter.tolist()) in stored:
                    disk = stored[tuple(parameter.tolist())]
                    found[trial.verdict].add(_INDEX.sub("{i}", disk))
    listed = {verdict: sorted(names) for verdict, names in found.items()}
    return {v: names for v, names in listed.items() if names or v != "input_scaled"}
