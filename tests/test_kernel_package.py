"""The package for the library `kernels`: its files, and its layer beside transformers' norms."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernel_package
import pytest
import torch
from kernel_folder import NORMS, load, norm, replaced
from norm_checks import gamma, rows, ulps
from torch import Tensor, nn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter truncates to bf16, and its kernels sum rows in an order of their own.
LIMIT = {torch.bfloat16: 4.0, torch.float16: 1.0, torch.float32: 8.0}
VARIANTS = ("torch-cpu", "torch-cuda")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kernels") / "package"
    assert kernel_package.main(["--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def layer(folder: Path) -> Any:
    return load(folder / "build" / "torch-cpu").layers.RMSNormZeroCentered


def contents(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_the_same_sources_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-P", str(Path(kernel_package.__file__)), "--out", "again"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert contents(tmp_path / "again") == contents(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_stands_alone(folder: Path, variant: str) -> None:
    root = folder / "build" / variant
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in allowed, path
            elif isinstance(node, ast.ImportFrom):
                home = path.parents[node.level - 1].joinpath(*str(node.module or "").split("."))
                assert home.is_relative_to(root)
                assert home.with_suffix(".py").is_file() or home.is_dir(), (path, node.module)


@pytest.mark.parametrize("variant", VARIANTS)
def test_metadata_is_of_the_files_that_are_there(folder: Path, variant: str) -> None:
    files = contents(folder / "build" / variant)
    data = json.loads(files.pop("metadata.json"))
    sums = {path: base64.b64encode(hashlib.sha256(b).digest()) for path, b in files.items()}
    assert data["digest"] == {
        "algorithm": "sha256",
        "files": {path: digest.decode() for path, digest in sums.items()},
    }
    assert data["backend"] == {"type": variant.removeprefix("torch-")}
    assert data["id"].isidentifier() and "LICENSE" in files


def test_every_form_is_in_a_namespace_of_its_own(folder: Path) -> None:
    import gemma_fold.ops

    x, gain = rows((3, 64), torch.float32, 1, "cpu"), gamma(64, 2, "cpu")
    want = gemma_fold.ops.rms_norm(x, gain, 1e-6)
    for variant in VARIANTS:
        module = load(folder / "build" / variant)
        assert torch.equal(module.rms_norm(x, gain, 1e-6), want)
        assert torch.equal(getattr(torch.ops, module.__name__).rms_norm(x, gain, 1e-6), want)
        assert set(module.__all__) - {"layers"} < set(gemma_fold.ops.__all__)
        assert all(getattr(module, name) is not None for name in module.__all__)


def test_a_folder_that_holds_something_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    assert kernel_package.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert contents(tmp_path) == {"mine": b"mine"}


@pytest.mark.parametrize(
    "line", ("import gemma_fold.ops", "from gemma_fold.engines import mode", "import hub_kernel")
)
def test_imports_that_lead_out_are_refused(line: str) -> None:
    with pytest.raises(kernel_package.PackageError, match=r"line 1: .* leads out of the package"):
        kernel_package.relative(f"{line}\n", 0)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("stored", LIMIT, ids=str)
@pytest.mark.parametrize("family", ("gemma3", "qwen3_5") if INTERPRETED else NORMS)
def test_the_layer_is_the_models_forward(
    layer: Any, family: str, stored: torch.dtype, dtype: torch.dtype
) -> None:
    module = norm(family, gamma(641, 3, "cpu").to(stored))
    x = rows((3, 641), dtype, 4, "cpu")
    want, got = module(x), replaced(module, layer, x)
    assert got.dtype == want.dtype
    if INTERPRETED:
        assert ulps(got, want.detach(), dtype) <= LIMIT[dtype]
    else:
        assert torch.equal(got, want)
    assert not torch.equal(got, rows((3, 641), dtype, 4, "cpu"))


def layouts() -> dict[str, Tensor]:
    wide = rows((2, 6, 5, 128), torch.float32, 5, "cpu")
    return {
        "heads of a wider tensor": wide[..., :64],
        "transposed": wide[..., 64:].transpose(1, 2),
        "columns apart": wide[..., ::2],
        "rows of three strides": wide[:, :4, :3, 64:],
        "one row": wide[0, 0, 0, :64],
        "none": wide[:0, ..., :64],
        "float64": wide[..., :64].double(),
    }


@pytest.mark.parametrize("case", layouts())
def test_the_layer_takes_what_the_model_takes(layer: Any, case: str) -> None:
    module, x = norm("gemma3", gamma(64, 6, "cpu").bfloat16()), layouts()[case]
    got, want = replaced(module, layer, x), module(x)
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_folded_gamma_gets_no_second_one(layer: Any) -> None:
    module = norm("gemma3", gamma(64, 7, "cpu").bfloat16())
    x = rows((5, 64), torch.float16, 8, "cpu")
    want = replaced(module, layer, x)
    module.weight = nn.Parameter((1.0 + module.weight.detach().float())[:, None])
    assert torch.equal(replaced(module, layer, x), want)
    module.weight = nn.Parameter(module.weight.detach().bfloat16())
    for y in (x, x.double()):
        with pytest.raises(TypeError, match="must be float32"):
            replaced(module, layer, y)


def test_a_weight_of_another_size_is_refused(layer: Any) -> None:
    module = norm("gemma3", gamma(64, 7, "cpu"))
    with pytest.raises(ValueError, match=r"weight must have shape \[32\]"):
        replaced(module, layer, rows((5, 64), torch.float32, 8, "cpu")[:, ::2])


@pytest.mark.skipif(
    INTERPRETED, reason="nothing of it runs a kernel that the operators' tests do not"
)
def test_gradients_are_the_models(layer: Any) -> None:
    module = norm("gemma3", gamma(64, 9, "cpu").bfloat16())
    x = rows((5, 64), torch.float32, 10, "cpu").requires_grad_()
    want = torch.autograd.grad(module(x).square().sum(), (x, module.weight))
    got = torch.autograd.grad(layer.forward(module, x).square().sum(), (x, module.weight))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4 if a.dtype == torch.float32 else 1e-2, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="nothing of it runs a kernel")
def test_it_compiles_in_one_graph(layer: Any) -> None:
    torch._dynamo.reset()
    module, x = norm("gemma3", gamma(64, 9, "cpu")), rows((5, 64), torch.bfloat16, 10, "cpu")
    want = module(x)
    module.forward = layer.forward.__get__(module)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), want)


@pytest.mark.skipif(not INTERPRETED, reason="run by the test below with TRITON_INTERPRET=1")
def test_the_interpreter_is_what_runs(layer: Any, folder: Path) -> None:
    kernels = sys.modules[f"{load(folder / 'build' / 'torch-cpu').__name__}.checks"]
    assert kernels.INTERPRETED
    replaced(norm("gemma3", gamma(64, 1, "cpu")), layer, rows((1, 64), torch.float32, 1, "cpu"))
    ran = sys.modules[f"{layer.__module__.removesuffix('.layers')}.kernels.rms_norm"]
    assert type(ran.rms_norm_kernel).__name__ == "InterpretedFunction"


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="it is what started this")
def test_the_layer_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    root = Path(__file__).resolve().parent.parent
    chosen = "layer or interpreter_is or gamma"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout
