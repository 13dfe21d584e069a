"""The package for the library `kernels` on a GPU: the compiled kernels. ``-m gpu``.

The folder is loaded by its path. What needs `kernels` is skipped where it is not installed, or not
the release that transformers wants.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernel_package
import pytest
import tiny
import torch
from kernel_folder import NORMS, load, norm, norm_class, replaced
from norm_checks import exact_norm, gamma, rows, ulps
from torch import nn
from transformers.utils.import_utils import is_kernels_available

from gemma_fold import ops

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIMIT = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 8.0}
NAME = "RMSNormZeroCentered"
IDS = torch.tensor([[2, 9, 31, 7, 50, 3, 18, 44]])
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("kernels") is None or not is_kernels_available(),
    reason="`kernels` is missing or not what transformers wants: the folder was loaded by its path",
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kernels") / "package"
    kernel_package.write(out)
    return out


@pytest.fixture(scope="session")
def layer(folder: Path) -> Any:
    return load(folder / "build" / "torch-cuda").layers.RMSNormZeroCentered


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", (64, 641, 1152, 5376, 16384))
@pytest.mark.parametrize("tokens", (1, 64, 1030))
def test_the_layer_is_the_models_forward(
    layer: Any, tokens: int, hidden: int, stored: torch.dtype, dtype: torch.dtype
) -> None:
    weight, x = gamma(hidden, 3, "cuda").to(stored), rows((tokens, hidden), dtype, 4, "cuda")
    module = norm("gemma3", weight).cuda()
    got, want = replaced(module, layer, x), module(x).detach()
    assert got.dtype == want.dtype
    assert ulps(got, want, dtype) <= LIMIT[dtype]
    assert torch.equal(got, ops.rms_norm(x, 1.0 + weight.float(), 1e-6))


@pytest.mark.parametrize("family", NORMS)
def test_it_is_no_further_from_float64_than_the_model(layer: Any, family: str) -> None:
    weight, x = gamma(5376, 3, "cuda").bfloat16(), rows((600, 5376), torch.bfloat16, 4, "cuda")
    module = norm(family, weight).cuda()
    exact = exact_norm(x, 1.0 + weight.double(), 1e-6)
    off = (replaced(module, layer, x).double() - exact).norm().item()
    assert off <= 1.001 * (module(x).detach().double() - exact).norm().item()


@pytest.mark.parametrize(
    "view",
    (
        lambda wide: wide[..., :64],
        lambda wide: wide[..., 64:].transpose(1, 2),
        lambda wide: wide[..., ::2],
        lambda wide: wide[:, :4, :3, 64:],
        lambda wide: wide[:0, ..., :64],
        lambda wide: wide[..., :64].double(),
    ),
)
def test_it_takes_what_the_model_takes(
    layer: Any, view: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    module = norm("gemma3", gamma(64, 6, "cuda").bfloat16()).cuda()
    x = view(rows((2, 6, 5, 128), torch.float32, 5, "cuda"))
    torch.testing.assert_close(replaced(module, layer, x), module(x), rtol=1e-5, atol=1e-5)


def test_a_folded_gamma_gets_no_second_one(layer: Any) -> None:
    module = norm("gemma3", gamma(640, 7, "cuda").bfloat16()).cuda()
    x = rows((5, 640), torch.bfloat16, 8, "cuda")
    want = replaced(module, layer, x)
    module.weight = nn.Parameter((1.0 + module.weight.detach().float())[:, None])
    assert torch.equal(replaced(module, layer, x), want)


def test_gradients_are_the_models(layer: Any) -> None:
    module = norm("gemma3", gamma(640, 9, "cuda")).cuda()
    x = rows((50, 640), torch.float32, 10, "cuda").requires_grad_()
    want = torch.autograd.grad(module(x).square().sum(), (x, module.weight))
    got = torch.autograd.grad(layer.forward(module, x).square().sum(), (x, module.weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, on the first compile
def test_it_runs_in_a_graph_and_under_a_compiler(layer: Any) -> None:
    module = norm("gemma3", gamma(640, 9, "cuda").bfloat16()).cuda()
    x = rows((8, 640), torch.bfloat16, 10, "cuda")
    want = replaced(module, layer, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = replaced(module, layer, x)
    graph.replay()
    assert torch.equal(captured, want)
    module.forward = layer.forward.__get__(module)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True)(x)
    assert ulps(compiled, want, torch.bfloat16) <= LIMIT[torch.bfloat16]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.cuda()).logits.double().cpu()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")  # of transformers, when it builds a model
@pytest.mark.parametrize("model_type", ("gemma3_text", "qwen3_5_text"))
def test_a_model_by_hand(layer: Any, model_type: str) -> None:
    exact = tiny.build(model_type, torch.bfloat16).cuda().double()
    model = tiny.build(model_type, torch.bfloat16).cuda()
    before = logits(model)
    cls = norm_class(model_type.removesuffix("_text"))
    replaced_norms = [module for module in model.modules() if type(module) is cls]
    for module in replaced_norms:
        module.forward = layer.forward.__get__(module)
    assert len(replaced_norms) > 4
    want = logits(exact)
    allowed = 1.5 * (before - want).abs().max() + 4 * 2**-7 * want.abs().max()
    assert (logits(model) - want).abs().max() <= allowed


@pytest.mark.filterwarnings("ignore")  # of transformers, when it builds a model
@needs_library
@pytest.mark.parametrize("how", ("mapping", "config"))
def test_use_kernels_of_transformers(
    folder: Path, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kernels
    from transformers import AutoModelForCausalLM, KernelConfig

    cls = norm_class("gemma3")
    monkeypatch.setattr(cls, "kernel_layer_name", NAME, raising=False)
    monkeypatch.setattr(cls, "kernel_condition", staticmethod(lambda _: True), raising=False)
    saved = tiny.save("gemma3_text", tmp_path, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(saved, device_map="cuda").eval()
    before = logits(model)
    if how == "mapping":
        repository = kernels.LocalLayerRepository(folder, layer_name=NAME)
        with kernels.use_kernel_mapping({NAME: {"cuda": repository}}):
            model.set_use_kernels(True)
    else:
        config = KernelConfig({NAME: {"cuda": f"{folder}:{NAME}"}}, use_local_kernel=True)
        model.set_use_kernels(True, config)
    for module in (one for one in model.modules() if type(one) is cls):
        assert Path(module.forward.__func__.__code__.co_filename).is_relative_to(folder)
    assert (logits(model) - before).abs().max() <= 4 * 2**-7 * before.abs().max()
