"""What each installed engine would fuse in a model, found out without loading a weight.

transformers builds the model without memory, and it is folded there. The sources of vLLM and SGLang
are read where they are installed, and their forwards run on stand-ins: neither is imported, because
that takes a GPU for some of their versions, and long for all.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from gemma_fold.engines.attach.handed import (
    block_problem,
    layer_problem,
    methods_in,
    model_problem,
)
from gemma_fold.engines.attach.report import Missing, Report
from gemma_fold.errors import NothingToFoldError, UnsupportedModelError

#: built: the model was built without weights. read: the engine's source was.
Level = Literal["built", "read"]
#: SGLang's file of a family, and what the names of its classes begin with.
_SGLANG = {
    "gemma2": ("gemma2", "Gemma2", "Model"),
    "gemma3": ("gemma3_causal", "Gemma3", "TextModel"),
}


#: The first and the last version of each engine whose fused counts were checked.
TESTED = {
    "transformers": ("5.17", "5.24"),
    "vllm": ("0.26", "0.33"),
    "sglang": ("0.5.17", "0.5.23"),
}


@dataclass(frozen=True, slots=True)
class Outlook:
    """What an engine would do with a model.

    report: what would be fused, or None where `note` says why that is not known.
    """

    engine: str
    level: Level
    report: Report | None = None
    note: str = ""

    @property
    def complete(self) -> bool:
        return self.report is None or self.report.complete


def in_transformers(config: Mapping[str, Any]) -> Outlook:
    """`config`: the original's. Raises UnsupportedModelError where there is nothing to fold."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from gemma_fold.engines.transformers.layers import fuse_layers
    from gemma_fold.engines.transformers.models import report, zero_centred_norms
    from gemma_fold.engines.transformers.norms import FoldedNorm

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


def in_vllm(config: Mapping[str, Any]) -> Outlook:
    """What native mode would do, by the source of the installed vLLM."""
    from gemma_fold.engines.vllm.known import FAMILIES, unknown_layer, unknown_model

    family = next((f for f in FAMILIES if f.module == _text_type(config)), None)
    if family is None:
        return Outlook("vllm", "read", note="native mode does not know this model: stock kernels")
    file = _source("vllm", f"model_executor/models/{family.module}.py")
    if not file.is_file():
        return Outlook("vllm", "read", note=f"this version has no {family.module}")
    model, layer = methods_in(file, family.model), methods_in(file, family.layer)
    if "forward" not in model or "forward" not in layer:
        return Outlook("vllm", "read", note="its forwards are inherited; they are checked at load")
    problem = unknown_model(family, model) or unknown_layer(family, layer)
    pairs = _layers(config) * 2 if family.layout == "sandwich" else 0
    if problem and not pairs:
        return Outlook("vllm", "read", note=f"its norms would be stock: {problem}")
    return Outlook("vllm", "read", _read("vllm", pairs, problem, _layers(config)))


def in_sglang(config: Mapping[str, Any]) -> Outlook:
    """What native mode would do, by the source of the installed SGLang."""
    family = _SGLANG.get(_text_type(config))
    if family is None:
        return Outlook("sglang", "read", note="this model has no sandwiches there")
    module, begin, model = family
    file = _source("sglang", f"srt/models/{module}.py")
    if not file.is_file():
        return Outlook("sglang", "read", note=f"this version has no {module}")
    problems = {
        f"{begin}{model}": model_problem(methods_in(file, begin + model)),
        f"{begin}DecoderLayer": layer_problem(methods_in(file, f"{begin}DecoderLayer"), "sandwich"),
    }
    sums = {
        f"{begin}Attention": block_problem(methods_in(file, f"{begin}Attention"), "o_proj"),
        f"{begin}MLP": block_problem(methods_in(file, f"{begin}MLP"), "down_proj"),
    }
    problem = _first(problems)
    pairs = _layers(config) * 2
    note = f"all-reduces would stay SGLang's: {_first(sums)}" if _first(sums) else ""
    return Outlook("sglang", "read", _read("sglang", pairs, problem, _layers(config)), note)


ENGINES = {"transformers": in_transformers, "vllm": in_vllm, "sglang": in_sglang}


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


def numbers(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with, to compare."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def _read(engine: str, pairs: int, problem: str, layers: int) -> Report:
    missing = (Missing(problem, "", "norm by norm", layers),) if problem else ()
    return Report(f"{engine} {installed(engine)}", 0, 0 if problem else pairs, pairs, missing)


def _first(problems: Mapping[str, str]) -> str:
    return next((f"{name}: {problem}" for name, problem in problems.items() if problem), "")


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


def _layers(config: Mapping[str, Any]) -> int:
    return int(_text_config(config).get("num_hidden_layers", 0))
