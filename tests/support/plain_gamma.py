"""Run a folded checkpoint as plain-gamma models run, by means of these tests' own.

Each zero-centred norm class is given a forward that multiplies by its parameter and adds nothing;
the parameter is what the folded checkpoint holds, read as [H] and kept in float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import NORM_CLASSES, gains
from safetensors.torch import load_file, save_file
from torch import Tensor


def rms_norm(self: Any, x: Tensor) -> Any:
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    group = getattr(self, "group_size", None)
    wide = x.float().reshape(*x.shape[:-1], -1, group) if group else x.float()
    x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (x_hat.reshape(x.shape) * self.weight).to(x.dtype)


def rms_norm_of_rounded_sum(self: Any, x: Tensor) -> Any:
    wide = x.float()
    x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    return (x_hat * self.weight.to(x.dtype).float()).to(x.dtype)


def layer_norm(self: Any, x: Tensor) -> Tensor:
    # the reference adds in x's dtype
    gamma = self.weight.to(x.dtype)
    return F.layer_norm(x, self.normalized_shape, gamma, self.bias, self.eps)


def layer_norm_then_scale(self: Any, x: Tensor) -> Any:
    return self.ln(x) * self.gamma.to(x.dtype)


def norm_class(name: str) -> Any:
    place = Path(NORM_CLASSES[name]["file"]).with_suffix("").as_posix().replace("/", ".")
    return getattr(import_module(f"transformers.{place}"), name)


@contextmanager
def plain_semantics() -> Iterator[None]:
    """Zero-centred norm classes multiply by their parameter, and add nothing to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, fact in NORM_CLASSES.items():
            if fact["verdict"] != "zero_centred":
                continue
            forward = layer_norm if fact["kind"] == "layernorm" else rms_norm
            if fact["kind"] == "rms" and fact["arithmetic_in_bf16"].startswith("bf16 add"):
                forward = rms_norm_of_rounded_sum
            if fact["param"] == "gamma":
                forward = layer_norm_then_scale
            patch.setattr(norm_class(name), "forward", forward)
        yield


def read(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def write(folder: Path, tensors: dict[str, Tensor], source: Path) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", folder)
    return folder


def unlock(folded: Path, source: Path) -> dict[str, Tensor]:
    """The folded checkpoint's tensors with every gamma as [H], checked against its source."""
    original, tensors = read(source), read(folded)
    assert json.loads((folded / "config.json").read_text())["base_config"] == json.loads(
        (source / "config.json").read_text()
    )
    for name, tensor in tensors.items():
        if tensor.shape != original[name].shape:
            assert tensor.dtype == torch.float32 and tensor.shape == (*original[name].shape, 1)
            tensors[name] = tensor.view(-1)
    return tensors


def load_plain(folder: Path, original: Any) -> Any:
    """Load with float32 gains; everything else in the dtypes that `original` has."""
    model = type(original).from_pretrained(folder, dtype=torch.float32)
    keep = {id(gain) for gain in gains(model)}
    like = dict(original.named_parameters())
    for name, parameter in model.named_parameters():
        if id(parameter) not in keep:
            parameter.data = parameter.data.to(like[name].dtype)
    buffers = dict(original.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name].data
    return model.eval()


def outputs(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        result = model(**inputs)
    values = [result] if isinstance(result, Tensor) else result.values()
    found = [v.float() for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    assert found and all(bool(v.isfinite().all()) for v in found)
    return found


def difference(one: list[Tensor], two: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, two, strict=True))
