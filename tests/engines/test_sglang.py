"""SGLang itself, on the CPU, says of a folded checkpoint what it says of the original.

The oracle is SGLang with the original checkpoint, in the same version, or float64 for gains.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import patience
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_fold.commands.convert import convert
from gemma_fold.errors import (
    CheckpointError,
    HostError,
    UnsupportedModelError,
    UsageError,
)

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is in an environment of its own", allow_module_level=True)

from sglang_checkpoints import Checkpoints
from sglang_server import OPTIONS, PROMPTS, Server, started

pytestmark = pytest.mark.engine

SERVE = ("-m", "gemma_fold", "serve", "--engine", "sglang")
FAMILIES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "vaultgemma",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
)


# Servers


def side_by_side(*jobs: Callable[[], Any], cores_each: int = 1) -> list[Any]:
    """What the jobs give; no more of them run at once than there are cores for."""
    at_once = max(1, patience.cores() // cores_each)
    with ThreadPoolExecutor(min(len(jobs), at_once)) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


@pytest.mark.parametrize(
    ("family", "mode", "ranks"), [("gemma2", "stock", 1), ("gemma3_text", "native", 2)]
)
def test_a_server_says_what_it_says_for_the_original(
    family: str, mode: str, ranks: int, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Before and after the server is told to load other weights from disk.

    That of the original refuses those of a folded checkpoint, and serves on.
    """

    def refuses(server: Server) -> None:
        folded = str(checkpoints.folded(family, 1))
        with pytest.raises(HTTPError) as refused:
            server.post("/update_weights_from_disk", model_path=folded)
        assert refused.value.code == 400
        assert b"is a folded checkpoint" in refused.value.read()

    def says(kind: Callable[[str, int], Path], log: str, **environment: str) -> tuple[Any, Any]:
        options = (*OPTIONS, f"--tp-size={ranks}")
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
        with started(kind(family, 0), tmp_path / log, *options, **environment) as server:
            before = server.outputs()
            server.settle()
            if kind == checkpoints.original and ranks == 1:
                refuses(server)
                assert server.outputs() == before
                server.settle()
            answer = server.post("/update_weights_from_disk", model_path=str(kind(family, 1)))
            assert answer["success"], answer
            return before, server.outputs()

    checkpoints.folded(family, 0), checkpoints.folded(family, 1)
    original, folded = side_by_side(
        lambda: says(checkpoints.original, "original"),
        lambda: says(checkpoints.folded, "folded", GEMMA_FOLD=mode),
        cores_each=ranks,
    )
    assert folded == original
    assert original[0] != original[1]


def test_the_real_270m_served_by_gemma_fold_says_what_the_original_says(
    real_270m: Path, tmp_path: Path
) -> None:
    folded = tmp_path / "folded"
    convert(real_270m, folded)
    options = tuple(option for option in OPTIONS if option != "--skip-tokenizer-init")

    def says(server: Server) -> tuple[Any, Any]:
        sampling = {"temperature": 0, "max_new_tokens": 6}
        text = server.post("/generate", text="The capital of France is", sampling_params=sampling)
        return text["text"], server.outputs(PROMPTS[:1], tokens=4)

    def original() -> tuple[Any, Any]:
        with started(real_270m, tmp_path / "original.log", *options) as server:
            return says(server)

    def ours() -> tuple[Any, Any]:
        with started(folded, tmp_path / "log", "--", *options, command=SERVE) as server:
            return says(server)

    expected, found = side_by_side(original, ours)
    assert found == expected
    assert len(expected[0]) > 8


def test_without_the_plugin_a_server_does_not_start(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    with (
        pytest.raises(RuntimeError, match="gemma_fold"),
        started(
            checkpoints.folded("gemma3_text"), tmp_path / "log", *OPTIONS, SGLANG_PLUGINS="none"
        ),
    ):
        pass


# Models in this process


@pytest.mark.parametrize(
    ("family", "mode"),
    [(family, "stock") for family in FAMILIES]
    # Where no two norms work as one.
    + [(family, "native") for family in ("vaultgemma", "qwen3_next", "qwen3_5", "qwen3_5_moe")],
)
def test_a_folded_model_is_the_original_to_sglang(
    family: str, mode: str, checkpoints: Checkpoints, sglang: Any
) -> None:
    """Config, architecture, every parameter, and every norm's output, to the bit."""
    original = sglang.Loaded(checkpoints.original(family))
    with sglang.mode(mode):
        folded = sglang.Loaded(checkpoints.folded(family))
    assert folded.config.hf_config.architectures == original.config.hf_config.architectures
    assert folded.config.hf_config.model_type == original.config.hf_config.model_type
    assert folded.config.dtype == original.config.dtype
    assert type(folded.model) is type(original.model)

    expected, found = original.state(), folded.state()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert original.norms().keys() == folded.norms().keys()
    # Gemma 1 has none: SGLang adds the 1 as it loads, in the dtype of what it is given.
    assert bool(original.norms()) == (family != "gemma")
    for name, norm in original.norms().items():
        x, residual = activations(norm.weight.shape[0])
        same(folded.norms()[name](x.clone()), norm(x.clone()))
        pair = folded.norms()[name](x.clone(), residual.clone())
        for ours, theirs in zip(pair, norm(x.clone(), residual.clone()), strict=True):
            same(ours, theirs)
    sglang.check_gains(folded, original.state())


@pytest.mark.parametrize("mode", ["stock", "native"])
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_a_draft_model_loads_its_part(
    family: str, mode: str, checkpoints: Checkpoints, sglang: Any
) -> None:
    """SGLang's NEXTN: its own layer and norms from the same checkpoint, the rest the target's."""
    original = sglang.Loaded(checkpoints.original(family), draft=True)
    with sglang.mode(mode):
        folded = sglang.Loaded(checkpoints.folded(family), draft=True)
    assert type(folded.model) is type(original.model)
    assert type(folded.model).__name__.endswith("MTP")
    expected, found = original.state(), folded.state()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert set(different) <= {"lm_head.weight", "model.embed_tokens.weight"}  # not loaded here
    assert len(folded.norms()) == 7
    sglang.check_gains(folded, expected)


def activations(hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, residual = torch.randn(2, 5, hidden, generator=generator).bfloat16()
    return x, residual


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_originals_keep_sglangs_own_classes(checkpoints: Checkpoints, sglang: Any) -> None:
    loaded = sglang.Loaded(checkpoints.original("gemma2"))
    assert {type(norm).__module__ for norm in loaded.norms().values()} == {
        "sglang.srt.layers.layernorm"
    }
    assert "load_weights" not in vars(loaded.model)


def test_native_folds_an_original_as_it_loads(checkpoints: Checkpoints, sglang: Any) -> None:
    original = sglang.Loaded(checkpoints.original("gemma2"))
    with sglang.mode("native"):
        folded = sglang.Loaded(checkpoints.original("gemma2"))
    sglang.check_gains(folded, original.state())


def test_a_mode_that_there_is_not(checkpoints: Checkpoints, sglang: Any) -> None:
    with sglang.mode("fast"), pytest.raises(UsageError, match="invalid GEMMA_FOLD='fast'"):
        sglang.Loaded(checkpoints.original("gemma2"))


def test_a_checkpoint_that_has_lost_a_gamma(
    checkpoints: Checkpoints, sglang: Any, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoints.folded("gemma2"), damaged)
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no gamma for model\.norm\.weight"):
        sglang.Loaded(damaged)


def test_gammas_without_the_tensor_lock_are_refused(
    checkpoints: Checkpoints, sglang: Any, tmp_path: Path
) -> None:
    convert(checkpoints.original("gemma2"), tmp_path / "flat", tensor_lock=False)
    with pytest.raises(UnsupportedModelError, match="--no-tensor-lock"):
        sglang.Loaded(tmp_path / "flat")


def test_a_version_of_sglang_that_lacks_a_hook(sglang: Any) -> None:
    from gemma_fold.engines.sglang import plugin

    hook, installed = plugin._HOOKS[0], version("sglang")
    for target, parameters in (
        ("sglang.srt.model_loader.loader.no_such_function", ()),
        ("sglang.srt.no_such_module.function", ()),
        (plugin._HOOKS[1].target, ("no_such_parameter",)),
    ):
        with pytest.raises(HostError, match=f"cannot attach to SGLang {re.escape(installed)}"):
            plugin._check(plugin.Hook(target, hook.function, hook.kind, parameters))
