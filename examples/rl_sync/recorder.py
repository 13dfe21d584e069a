"""A forward hook that writes what a module made, of the one pass that is to be looked at.

SGLang makes the hook itself, in its own process, from a name (`--forward-hooks`); the file `NOW` in
the folder says when to write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

NOW = "now"
BLOCKS = ("self_attn", "mlp")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
LAST_NORM = "model.norm"
#: Scaled by SGLang with a float, by transformers and vLLM with one rounded to bf16.
EMBEDDING = "model.embed_tokens"


def names(layers: int) -> list[str]:
    """What is looked at: attention and feed-forward blocks, norms of q and k, the last norm."""
    parts = (*BLOCKS, *HEAD_NORMS)
    return [*(f"model.layers.{i}.{part}" for i in range(layers) for part in parts), LAST_NORM]


def hook(config: dict[str, str]) -> Callable[..., None]:
    """`config`: the `folder`, and the module's `name`."""
    folder, name = Path(config["folder"]), config["name"]

    def record(module: Any, args: tuple[Any, ...], output: Any) -> None:
        file = folder / f"{name}.pt"
        if file.exists() or not (folder / NOW).exists():
            return  # SGLang starts one pass more before it sees that a request is done
        made = output[0] if isinstance(output, tuple) else output
        found = {"y": made.detach().clone()}
        if name.endswith("_norm"):
            found["x"] = args[0].detach().clone()
        torch.save(found, file)

    return record


@contextmanager
def recording(folder: Path) -> Iterator[None]:
    """Hooks write the first pass while this lasts."""
    for old in folder.glob("*.pt"):
        old.unlink()
    now = folder / NOW
    now.touch()
    try:
        yield
    finally:
        now.unlink()


def recorded(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What the hooks wrote, by module."""
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}
