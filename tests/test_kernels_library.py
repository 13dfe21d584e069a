"""The package in the library `kernels`, without a network: tiny models, kernelized on the CPU.

transformers takes one minor release of `kernels` and says that there is none beside another.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import kernel_package
import pytest
import tiny
import torch
from kernel_folder import norm_class

pytest.importorskip("kernels")

import kernels
import transformers
from kernels import LocalLayerRepository, Mode
from transformers.utils.import_utils import is_kernels_available

# Other layers of these models have names, too; kernels 0.16 warns of those.
pytestmark = pytest.mark.filterwarnings(r"ignore:\sNo kernel mapping found:UserWarning")
NAME = "RMSNormZeroCentered"
FAMILIES = {"gemma3_text": "gemma3", "qwen3_5_text": "qwen3_5"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kernels") / "package"
    kernel_package.write(out)
    return out


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def mapping(folder: Path) -> dict[str, dict[str, Any]]:
    repository = LocalLayerRepository(folder, layer_name=NAME)
    return {NAME: {"cpu": repository, "cuda": repository}}


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The norms under their name, which Gemma's lack, and all where transformers has a stand-in."""
    for family in FAMILIES.values():
        cls = norm_class(family)
        monkeypatch.setattr(cls, "kernel_layer_name", NAME, raising=False)
        monkeypatch.setattr(cls, "kernel_condition", staticmethod(lambda _: True), raising=False)
    yield


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([[2, 9, 31, 7, 50]])).logits
    return found


def norms(model: Any, model_type: str) -> list[Any]:
    cls = norm_class(FAMILIES[model_type])
    return [module for module in model.modules() if type(module) is cls]


def is_ours(module: Any, folder: Path) -> bool:
    """By the package's name: a copy of it that was imported before is the same one."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, MethodType):
        return False
    variants = folder.glob("build/*/metadata.json")
    names = {json.loads(path.read_text())["id"] for path in variants}
    return forward.__func__.__module__.split(".")[0] in names


@pytest.mark.parametrize(
    "mode", (Mode.INFERENCE, Mode.TRAINING, Mode.INFERENCE | Mode.TORCH_COMPILE)
)
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.usefixtures("named")
def test_a_kernelized_model_gives_the_same_bits(
    model_type: str, mode: Mode, mapping: Any, folder: Path
) -> None:
    model = tiny.build(model_type, torch.bfloat16).eval()
    want, found = logits(model), norms(model, model_type)
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device="cpu")
    assert len(found) > 4
    assert all(is_ours(module, folder) for module in found)
    assert torch.equal(logits(model), want)


@pytest.mark.usefixtures("named")
def test_without_the_mapping_the_layers_stay(folder: Path) -> None:
    model = tiny.build("gemma3_text", torch.bfloat16).eval()
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        kernels.kernelize(model, mode=Mode.INFERENCE, device="cpu")
    assert not any(is_ours(module, folder) for module in norms(model, "gemma3_text"))


@pytest.mark.usefixtures("named")
def test_a_folded_model_keeps_its_own_norms(mapping: Any) -> None:
    import gemma_fold

    model = gemma_fold.fold_model(tiny.build("gemma3_text", torch.bfloat16).eval())
    want = logits(model)
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=Mode.INFERENCE, device="cpu")
    assert torch.equal(logits(model), want)


def test_the_library_reads_both_variants(folder: Path) -> None:
    for variant in ("torch-cpu", "torch-cuda"):
        module = kernels.get_local_kernel(folder / "build" / variant)
        assert hasattr(module.layers, NAME) and module.__name__.startswith("_gemma_fold_norms_")


@pytest.mark.skipif(not is_kernels_available(), reason="transformers wants another `kernels`")
@pytest.mark.usefixtures("named")
def test_use_kernels_of_transformers(
    mapping: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = tiny.save("gemma3_text", tmp_path, torch.bfloat16)
    load = transformers.AutoModelForCausalLM.from_pretrained
    want = logits(load(saved).eval())
    with kernels.use_kernel_mapping(mapping), caplog.at_level(logging.WARNING):
        model = load(saved, use_kernels=True).eval()
    assert model.use_kernels
    assert all(is_ours(module, folder) for module in norms(model, "gemma3_text"))
    assert torch.equal(logits(model), want)


@pytest.mark.skipif(not is_kernels_available(), reason="transformers wants another `kernels`")
def test_a_kernel_config_reads_the_folder_for_cuda(folder: Path) -> None:
    """It takes no CPU; what it makes of the folder for a GPU is loaded here."""
    from transformers.utils.kernel_config import add_to_mapping_local

    made: dict[str, Any] = {}
    add_to_mapping_local(NAME, "cuda", f"{folder}:{NAME}", Mode.INFERENCE, made)
    layer = made[NAME]["cuda"][Mode.INFERENCE].load()
    assert layer.__name__ == NAME and Path(layer.forward.__code__.co_filename).is_relative_to(
        folder
    )
