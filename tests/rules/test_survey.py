"""The tables say what `tools/survey.py` finds in released code, and it finds what it should."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import norm_trial
import pytest
import survey
import survey_source
import torch
from torch import nn

from gemma_fold.rules import TABLE

SOURCES: dict[str, Any] = json.loads(survey.SOURCES.read_text())
FILES = [
    (engine, name, entry)
    for engine, told in SOURCES.items()
    for name, entry in told["files"].items()
]


# --- the trial -----------------------------------------------------------------------------------


class Norm(nn.Module):
    """An RMSNorm that adds `offset` to its weight, in the dtype of the weight or in float32."""

    def __init__(self, offset: float, add_in: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16))
        self.offset, self.add_in = offset, add_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        weight = self.weight.to(self.add_in or self.weight.dtype)
        return (x_hat * (self.offset + weight).float()).to(x.dtype)


class Gated(Norm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        assert gate is not None
        return super().forward(x) * torch.sigmoid(gate)


class InputScaled(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = (x.float() * (1 + self.weight).float()).to(x.dtype).float()
        mean = scaled.pow(2).mean(-1, keepdim=True)
        return (scaled * torch.rsqrt(mean + 1e-6)).to(x.dtype)


@pytest.mark.parametrize(
    ("module", "verdict", "offset", "rounding"),
    [
        (Norm(1.0, torch.float32), "zero_centred", 1.0, norm_trial.FP32),
        (Norm(1.0), "zero_centred", 1.0, norm_trial.STORAGE_ADD),
        (Norm(0.2, torch.float32), "zero_centred", 0.2, "unknown"),
        (Norm(0.0), "plain", 0.0, ""),
        (Gated(1.0, torch.float32), "zero_centred", 1.0, "unknown"),
        (Gated(0.0), "plain", 0.0, ""),
        (InputScaled(1.0), "input_scaled", 0.0, norm_trial.STORAGE_INPUT),
        (nn.LayerNorm(16), "plain", 0.0, ""),
        (nn.BatchNorm2d(4), "plain", 0.0, ""),
        (nn.PReLU(16), "other", 0.0, ""),
    ],
)
def test_a_trial_tells_what_a_module_does(
    module: nn.Module, verdict: str, offset: float, rounding: str
) -> None:
    trial = norm_trial.tried(module, "weight")
    assert trial is not None
    assert (trial.verdict, trial.offset, trial.rounding) == (verdict, offset, rounding)


def test_a_module_laid_out_without_memory_is_tried_too() -> None:
    with torch.device("meta"):
        module = Norm(1.0)
    trial = norm_trial.tried(module, "weight")
    assert trial is not None and trial.verdict == "zero_centred"


# --- the reading ---------------------------------------------------------------------------------

PACKAGE = {
    "layers.py": """
        class Shifted:
            def forward(self, x):
                weight = self.weight.float()
                return x * (1.0 + weight)
        class Plain:
            def forward(self, x):
                total = self.weight.sum() + 1e-20
                return x * self.weight / total
        class Alias(Shifted):
            pass
        def helper(x, weight):
            scale = weight.float()
            scale = scale + 1.0
            return x * scale
        class CallingNorm:
            def forward(self, x):
                return helper(x, self.weight)
        class KernelNorm:
            def forward(self, x):
                return rms(x, self.weight, weight_bias=1.0)
    """,
    "models/direct.py": "from pkg.layers import Alias as N\nclass Model:\n    norm = N\n",
    "models/relative.py": "from ..layers import CallingNorm\nnorm = CallingNorm()\n",
    "models/kernel.py": "from pkg.layers import KernelNorm\nnorm = KernelNorm()\n",
    "models/based.py": "from pkg.models.direct import Model\nclass Head(Model):\n    pass\n",
    "models/loads.py": """
        def load(weights):
            for name, loaded_weight in weights:
                loaded_weight += 1.0
    """,
    "models/composed.py": "loader = composed_weight_loader(default, lambda x: x + offset)\n"
    "def made(): return composed_weight_loader(default, lambda x: x + offset)\n",
    "models/plain.py": "from pkg.layers import Plain\nnorm = Plain()\n",
    "models/unused.py": "import os\n",
    "models/broken.py": "def (\n",
    "configs.py": """
        class C:
            model_type = 'new_type'
        class W:
            model_type = 'wrapper'
            def __init__(self, text_config):
                self.text_config = text_config
    """,
}


@pytest.fixture
def package(tmp_path: Path) -> survey_source.Source:
    for name, text in PACKAGE.items():
        path = tmp_path / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return survey_source.Source(tmp_path / "pkg")


def test_the_reading_follows_names_to_what_adds(package: survey_source.Source) -> None:
    assert package.users(["models/"]) == {
        "models/based.py": ["Model"],
        "models/composed.py": ["made"],
        "models/direct.py": ["Alias"],
        "models/kernel.py": ["KernelNorm"],
        "models/loads.py": ["load"],
        "models/relative.py": ["CallingNorm"],
    }


def test_the_reading_finds_model_types(package: survey_source.Source) -> None:
    assert survey_source.model_types(package, ["configs"]) == {
        "new_type": "configs.py:3",
        "wrapper": "configs.py:5",
    }
    assert survey_source.wrappers(package, ["configs"]) == {"wrapper"}


# --- the tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "name", "entry"), FILES, ids=[f"{e}-{n}" for e, n, _ in FILES])
def test_every_engine_file_with_a_zero_centred_norm_has_a_row(
    engine: str, name: str, entry: dict[str, Any]
) -> None:
    known = {key for row in TABLE for key in (*row.model_types, *row.architectures)}
    assert set(entry["rows"]) <= known
    assert bool(entry["rows"]) is not bool(entry.get("why"))


def test_new_wrappers_are_added_and_none_is_taken_away() -> None:
    text = survey.PLAIN.read_text()
    known = survey.block(text, "WRAPPERS")
    assert set(known) <= survey.plain_rows()
    changed, problems = survey.wrappers(text, {"llava", "zamba"})
    assert problems == ["WRAPPERS of plain.py lacks zamba"]
    assert survey.block(changed, "WRAPPERS") == sorted([*known, "zamba"])


@pytest.mark.parametrize("name", ["EXECUTED", "READ", "EXECUTED_5_24", "WRAPPERS"])
def test_lists_are_written_as_they_are_read(name: str) -> None:
    text = survey.PLAIN.read_text()
    words = survey.block(text, name)
    assert words
    assert survey.with_block(text, name, words) == text
    assert survey.block(survey.with_block(text, name, ["a-b", "c"]), name) == ["a-b", "c"]


def test_class_rows_are_written_as_they_are_read() -> None:
    text = survey.CLASSES.read_text()
    classes = json.loads(survey.NORMS.read_text())["_about"]["classes"]
    assert survey.class_rows(text, classes, survey.PINNED) == text
    new = {"NewNorm": classes["NemotronLayerNorm1P"]}
    assert 'NormClass("NewNorm", _ran(' in survey.class_rows(text, classes | new, survey.PINNED)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """What is read or built is a great many objects that stay: to look for garbage takes longer."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow  # modeling files of all models are read
@pytest.mark.usefixtures("uncollected")
def test_reading_finds_the_classes_that_running_found() -> None:
    import transformers

    classes = json.loads(survey.NORMS.read_text())["_about"]["classes"]
    source = survey_source.Source(Path(str(transformers.__file__)).parent)
    found = {
        (adder.file, adder.name)
        for adder in source.adders
        if adder.file.startswith("models/") and "/modeling_" in adder.file
    }
    # Its gamma is the noise of a diffusion step, and no weight.
    found -= {("models/esmfold2/modeling_esmfold2.py", "EsmFold2Model")}
    assert found == {(fact["file"], name) for name, fact in classes.items()}


@pytest.mark.slow  # every model of transformers is built
@pytest.mark.usefixtures("uncollected")
@pytest.mark.filterwarnings("ignore")
def test_the_tables_say_what_the_installed_transformers_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import survey_models
    from transformers.initialization import no_init_weights

    sweep = survey_models.sweep

    def laid_out(report: Callable[[str], None]) -> survey_models.Sweep:
        """What weights begin with is nothing to a trial, which gives them values of its own."""
        with no_init_weights():
            return sweep(report)

    monkeypatch.setattr(survey_models, "sweep", laid_out)
    assert survey.transformers(write=False) == []


@pytest.mark.engine
@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("engine", ["vLLM", "SGLang"])
def test_the_installed_engine_has_no_file_without_a_row(engine: str) -> None:
    spec = importlib.util.find_spec(engine.lower())
    if spec is None or spec.origin is None or not installed(engine.lower()):
        pytest.skip(f"{engine} is not installed")
    users = survey_source.Source(Path(spec.origin).parent).users(survey.MODELS[engine])
    assert users
    known = {file: entry["adds"] for file, entry in SOURCES[engine]["files"].items()}
    assert places(users) <= places(known)


def places(users: dict[str, list[str]]) -> set[tuple[str, str]]:
    """Each file with each name, or the folder of one model: between releases vLLM splits it up."""
    return {
        (f"models/{parts[1]}", "") if parts[0] == "models" and len(parts) > 2 else (file, name)
        for file, names in users.items()
        for parts in (file.split("/"),)
        for name in names
    }


def installed(package: str) -> bool:
    """Whether a distribution brought it; a stub has none."""
    return bool(importlib.metadata.packages_distributions().get(package))
