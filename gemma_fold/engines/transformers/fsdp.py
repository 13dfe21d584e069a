"""FSDP2 of a folded model: float32 gammas beside weights of 16 bits.

`fully_shard` wants one dtype for all parameters that it gathers together, and casts all of them to
that of its mixed-precision policy. Gammas are float32 and stay so: they get groups of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from gemma_fold.engines.transformers.norms import FoldedNorm
from gemma_fold.errors import UnsupportedModelError, UsageError


def shard_norms(model: nn.Module, **options: Any) -> None:
    """Apply FSDP2 to the folded norms of `model`, before it is applied to anything else.

    The norms of a layer are one group, gathered and reduced in float32; a `fully_shard` of the
    layer then leaves them out. Their hooks keep a layer's norms from running as one operator, and
    no bit depends on that.

    Args:
        model: a folded transformers model, of any dtype.
        options: of `fully_shard`, such as `mesh` or `reshard_after_forward`; no `mp_policy`.

    Raises:
        UnsupportedModelError: the model is not folded, or sharded already.
        UsageError: there is an `mp_policy`, which would cast gammas.
    """
    if "mp_policy" in options:
        raise UsageError(
            "gammas stay float32, so shard_norms takes no mp_policy; give it to fully_shard of the "
            "layers and of the model"
        )
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UnsupportedModelError(
            "the model is sharded already; call shard_norms before the first fully_shard"
        )
    groups = list(_groups(model))
    if not groups:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not folded, so its norms need no groups of their own; call "
            "gemma_fold.fold_model first, or fully_shard alone"
        )
    for norms in groups:
        fully_shard(norms, **options)


def _groups(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The folded norms of each layer, then each that is in none."""
    taken: set[nn.Module] = set()

    def folded(module: nn.Module) -> list[nn.Module]:
        found = [m for m in module.modules() if isinstance(m, FoldedNorm) and m not in taken]
        taken.update(found)
        return list(found)

    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                if norms := folded(layer):
                    yield norms
    for norm in folded(model):
        yield [norm]
