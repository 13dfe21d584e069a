"""SGLang's norms after a hundred pushes from a trainer, and rows in batches of any size.

The oracle is the operator on the trainer's own gamma, which the trainer's norms are, too.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is in an environment of its own", allow_module_level=True)

from norm_checks import rows
from sglang_checkpoints import Checkpoints

from gemma_fold import ops

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("mode", ["stock", "native"])
def test_a_hundred_pushes_leave_the_gammas_of_the_trainer(
    mode: str, checkpoints: Checkpoints, sglang: Any
) -> None:
    """Folded and raw in turns. Trained gammas have bits that no raw w holds, those near 0 most."""
    folder = checkpoints.folded("gemma3_text")
    with sglang.mode(mode):
        loaded = sglang.Loaded(folder)
    tensors = load_file(folder / "model.safetensors")
    names = [name for name, tensor in tensors.items() if tensor.shape[1:] == (1,)]
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        pushed = dict(tensors)
        for name in names:
            noise = torch.randn(tensors[name].shape, generator=generator)
            gamma = tensors[name] = 0.9 * tensors[name] + 0.1 * noise
            pushed[name] = gamma
            if step % 2:
                pushed[name] = (gamma - 1).view(-1)
                tensors[name] = (1 + pushed[name])[:, None]
        succeeded, message = loaded.updater.update_weights_from_tensor(list(pushed.items()))
        assert succeeded, message
        for name, norm in loaded.norms().items():
            assert torch.equal(norm.gamma32, tensors[f"{name}.weight"].view(-1)), (step, name)


def test_native_norms_are_the_operator_on_every_row(checkpoints: Checkpoints, sglang: Any) -> None:
    """Those of Gemma 3, alone and in pairs: bit for bit, and whatever rows are beside."""
    with sglang.mode("native"):
        loaded = sglang.Loaded(checkpoints.folded("gemma3_text"))
    found = loaded.norms()
    post, pre = (
        found[f"model.layers.0.{name}"]
        for name in ("post_attention_layernorm", "pre_feedforward_layernorm")
    )
    x, residual = (rows((33, post.gamma32.shape[0]), torch.bfloat16, n, "cpu") for n in (1, 2))
    gains = (post.gamma32, pre.gamma32, post.epsilon, pre.epsilon)
    y, total = ops.rms_norm_add_rms_norm(x, residual, *gains)
    alone = ops.rms_norm(x, found["model.layers.0.input_layernorm"].gamma32, pre.epsilon)
    for start, end in ((0, 33), (0, 1), (7, 8), (5, 22)):
        part = slice(start, end)
        made = pre(post(x[part].clone()), residual[part].clone())
        assert torch.equal(made[0], y[part])
        assert torch.equal(made[1], total[part])
        first = found["model.layers.0.input_layernorm"](x[part].clone())
        assert torch.equal(first, alone[part])
