"""The package of norm kernels, loaded from its folder as the library `kernels` does, without it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn


def load(variant: Path) -> ModuleType:
    """The module of a build variant, under the name that its metadata gives."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


#: Norms of transformers that add 1 to their weight, by the module of the family.
NORMS = {
    "gemma": "GemmaRMSNorm",
    "gemma2": "Gemma2RMSNorm",
    "gemma3": "Gemma3RMSNorm",
    "qwen3_next": "Qwen3NextRMSNorm",
    "qwen3_5": "Qwen3_5RMSNorm",
    "qwen3_5_moe": "Qwen3_5MoeRMSNorm",
}


def norm_class(family: str) -> type[nn.Module]:
    """The class of a family's norms in the installed transformers."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    found: type[nn.Module] = getattr(module, NORMS[family])
    return found


def norm(family: str, weight: Tensor) -> nn.Module:
    """A norm of transformers' own class with this weight."""
    module = norm_class(family)(weight.shape[0], eps=1e-6)
    module.weight = nn.Parameter(weight.clone())
    return module


def replaced(module: nn.Module, layer: type[nn.Module], x: Tensor) -> Tensor:
    """What `module` gives once its forward is the layer's, as `kernelize` binds it."""
    with torch.no_grad():
        y: Tensor = layer.forward.__get__(module)(x)
    return y
