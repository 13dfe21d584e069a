"""One rank of test_fsdp.py: `python fsdp_worker.py RANK STORE RESULT`, two of them side by side.

Both ranks are given the same batch, so that the mean of their gradients is that of one, exactly,
and a model that is not sharded says what must come out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from gemma_fold import fold_model, unfold_model
from gemma_fold.engines.transformers import shard_norms
from gemma_fold.engines.transformers.norms import FoldedNorm

IDS = torch.arange(3, 35).view(2, 16)


def folded(dtype: torch.dtype) -> Any:
    return fold_model(tiny.build("gemma3_text", dtype)).train()


def sharded(model: Any, **options: Any) -> Any:
    shard_norms(model)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def train(model: Any, steps: int = 2) -> list[torch.Tensor]:
    """The logits of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    said = []
    for _ in range(steps):
        out = model(IDS, labels=IDS, use_cache=False)
        out.loss.backward()
        # Far above any norm: two processes add it up in another order, and 1.0 is 1.0.
        nn.utils.clip_grad_norm_(model.parameters(), 1e4)
        optimizer.step()
        optimizer.zero_grad()
        said.append(out.logits.detach().clone())
    return said


def whole(model: Any) -> dict[str, torch.Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def refusal(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def trained_alike(checkpointing: bool) -> dict[str, Any]:
    """bf16 weights and float32 gammas, sharded and not."""
    one, two = folded(torch.bfloat16), folded(torch.bfloat16)
    if checkpointing:
        for model in (one, two):
            model.gradient_checkpointing_enable()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    logits = same(train(sharded(two)), train(one))
    found, expected = whole(two), one.state_dict()
    norms = [name for name in expected if "norm" in name]
    return {
        "logits": logits,
        "different": [n for n in found if not torch.equal(found[n], expected[n])],
        "gammas": [str(found[n].dtype) for n in norms],
        "trained": [n for n in norms if not torch.equal(found[n], before[n])] == norms,
    }


def mixed_precision() -> dict[str, Any]:
    """float32 weights computed in bf16: every weight is cast but the gammas."""
    model = sharded(folded(torch.float32), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    seen: list[str] = []
    for module in model.modules():
        if isinstance(module, FoldedNorm):
            module.register_forward_hook(lambda m, *_: seen.append(str(m.gain.dtype)))
    with torch.no_grad():
        said = model(IDS, use_cache=False).logits
        cast = folded(torch.float32)
        for parameter in cast.parameters():
            if parameter.shape[1:] != (1,):  # no gamma
                parameter.data = parameter.data.bfloat16()
        expected = cast(IDS, use_cache=False).logits
    return {"logits": torch.equal(said, expected), "seen": sorted(set(seen))}


def refusals() -> dict[str, str]:
    model = folded(torch.bfloat16)
    layer_first = folded(torch.bfloat16)
    return {
        "alone": refusal(lambda: fully_shard(layer_first.model.layers[0])(torch.zeros(1, 1, 32))),
        "policy": refusal(lambda: shard_norms(model, mp_policy=MixedPrecisionPolicy())),
        "original": refusal(lambda: shard_norms(tiny.build("gemma3_text"))),
        "twice": refusal(lambda: shard_norms(sharded(model))),
        "unfold": refusal(lambda: unfold_model(model)),
    }


def main() -> None:
    rank, store, result = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    found = {
        "plain": trained_alike(checkpointing=False),
        "checkpointing": trained_alike(checkpointing=True),
        "mixed": mixed_precision(),
        "refusals": refusals(),
    }
    Path(result).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
