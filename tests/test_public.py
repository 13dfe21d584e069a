"""The public face: every name works from the top, and nothing is imported before it is used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch

import gemma_fold
import gemma_fold.engines.transformers
from gemma_fold import errors

LAZY = (gemma_fold, gemma_fold.engines.transformers)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def static_imports(module: ModuleType) -> Iterator[tuple[str, str]]:
    """What type checkers see: names in the TYPE_CHECKING block, and the modules they are from."""
    assert module.__file__ is not None
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom) and statement.module is not None
                yield from ((alias.name, statement.module) for alias in statement.names)


@pytest.mark.parametrize("module", LAZY, ids=lambda module: module.__name__)
def test_names_that_are_imported_on_first_use_are_where_type_checkers_look(
    module: ModuleType,
) -> None:
    for name, home in static_imports(module):
        given = getattr(module, name)
        assert given is getattr(import_module(home), name)
    listed = {name for name, _ in static_imports(module)}
    assert listed == set(module._HOME)
    assert listed <= set(module.__all__) <= set(dir(module))


def test_every_name_that_is_public_is_listed() -> None:
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert raised <= set(gemma_fold.__all__)
    assert len(set(gemma_fold.__all__)) == len(gemma_fold.__all__)
    for name in gemma_fold.__all__:
        assert getattr(gemma_fold, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'fold'"):
        gemma_fold.fold  # noqa: B018


@pytest.mark.slow
def test_commands_stay_functions_whatever_was_imported() -> None:
    code = """
import gemma_fold, pkgutil
from importlib import import_module
for part in ("commands", "compare", "format", "checkpoint"):
    package = import_module(f"gemma_fold.{part}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        import_module(module.name)
print([callable(getattr(gemma_fold, name)) for name in
       ("inspect", "convert", "verify", "unfold", "diff", "load", "fold_model", "unfold_model")])
"""
    assert run(code).strip() == str([True] * 8)


def test_the_top_imports_nothing_heavy() -> None:
    code = "import sys, gemma_fold, json; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(run(code))
    heavy = {"torch", "numpy", "transformers", "safetensors", "huggingface_hub", "click", "triton"}
    assert not heavy & set(loaded)
    assert [name for name in loaded if name.startswith("gemma_fold")] == [
        "gemma_fold",
        "gemma_fold._version",
        "gemma_fold.errors",
    ]


WRAPPED = """
import importlib, pkgutil
from transformers import PreTrainedConfig, PreTrainedModel
def state():
    return [PreTrainedConfig.__dict__["get_config_dict"], PreTrainedConfig.to_dict,
            PreTrainedConfig.to_json_file, PreTrainedModel.save_pretrained,
            PreTrainedModel.__dict__["_load_pretrained_model"]]
def changed(before):
    return sum(one is not two for one, two in zip(before, state()))
first = state()
"""


@pytest.mark.slow
def test_importing_the_transformers_integration_changes_nothing_and_install_all_once() -> None:
    code = f"""{WRAPPED}
import gemma_fold.engines.transformers as integration
for module in pkgutil.walk_packages(integration.__path__, integration.__name__ + "."):
    importlib.import_module(module.name)
print(changed(first))
integration.install()
print(changed(first))
second = state()
integration.install()
print(changed(second))
"""
    assert run(code).split() == ["0", "5", "0"]


@pytest.mark.slow
def test_an_unpickled_model_installs_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(gemma_fold.fold_model(tiny.build("gemma3_text")), path)
    code = f"""{WRAPPED}
import torch
torch.load({str(path)!r}, weights_only=False)
print(changed(first))
"""
    assert run(code).split() == ["5"]
