"""SGLang's fusions that read a gain in 16 bits: every reader, and what native norms do there."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import pkgutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is in an environment of its own", allow_module_level=True)

from gemma_fold.engines.sglang import boundary

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

_FUSIONS = "sglang.srt.layers.layer_boundary.fusions"


@pytest.fixture
def norms(sglang: Any) -> dict[str, Any]:
    """A norm of SGLang, one in stock mode and one in native mode, all of one weight."""
    from sglang.srt.layers.layernorm import GemmaRMSNorm

    from gemma_fold.engines.sglang.norms import adopt
    from gemma_fold.engines.sglang.weights import norm_class

    weight = torch.linspace(-3, 3, 64).bfloat16()
    made = {}
    for mode in (None, "stock", "native"):
        norm = GemmaRMSNorm(64).to(torch.bfloat16)
        if mode:
            adopt(norm, norm_class(norm, mode))
        norm.weight.weight_loader(norm.weight, weight)
        made[str(mode)] = norm
    return made


def test_every_reader_of_the_rounded_gain_is_known() -> None:
    """A version that reads it elsewhere needs a look at what native norms do there."""
    import sglang.srt

    root = Path(sglang.srt.__path__[0])
    readers = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if "gemma_weight" in path.read_text("utf-8")
    }
    hooked = {
        "layers/layernorm.py",
        "layers/layer_boundary/fusions/cutedsl.py",
        "layers/layer_boundary/fusions/norm.py",
        "layers/layer_boundary/residual/batch.py",
    }
    harmless = {
        "layers/layer_boundary/residual/__init__.py",  # a comment
        "layers/layer_boundary/fusions/custom_all_reduce_fusion.py",  # a comment
        "model_loader/loader.py",  # renews it
    }
    ascend_alone = {"models/minimax_m3.py", "models/qwen3_5.py"}
    assert "layers/layernorm.py" in readers
    assert readers <= hooked | harmless | ascend_alone


def test_the_fused_all_reduce_is_of_an_attention() -> None:
    """For another group gemma-fold's hook would leave the rounded gain to SGLang."""
    from sglang.srt.layers.layernorm import GemmaRMSNorm

    source = inspect.getsource(GemmaRMSNorm.forward_with_allreduce_fusion)
    assert "use_attn_tp_group=True,\n        )" in source


def gain_function() -> Any:
    for name in (f"{_FUSIONS}.norm.fused_norm_gamma", f"{_FUSIONS}.cutedsl._fused_norm_gamma"):
        try:
            return pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            continue
    return pytest.skip("this version has no such fusions")


def test_fusions_get_no_gain_of_a_native_norm(norms: dict[str, Any]) -> None:
    gain = gain_function()
    assert gain(norms["native"]) is None
    rounded = (norms["None"].weight + 1).detach()
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(gain(norms["None"]), rounded)
    assert torch.equal(gain(norms["stock"]), rounded)


def test_the_gain_of_a_stock_norm_is_never_stale(norms: dict[str, Any]) -> None:
    from gemma_fold.engines.sglang.weights import load_direct

    model = torch.nn.ModuleDict({"norm": norms["stock"]})
    weight = torch.linspace(5, -5, 64).bfloat16()
    load_direct(lambda model, named: None, model, [("norm.weight", weight)])
    assert torch.equal(gain_function()(norms["stock"]), weight + 1)


def test_a_fusion_that_was_planned_before_the_norm_was_native_declines(
    norms: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang plans them while it builds a layer, before gemma-fold sees the model."""
    cutedsl = pytest.importorskip(f"{_FUSIONS}.cutedsl")
    names = (
        "_ffn_input_all_reduce_add_norm",
        "_mlp_input_reduce_output_and_update_and_read_residual",  # until 0.5.21
    )
    parallel = SimpleNamespace(attn_cp_size=1, tp_size=2)
    exec_ = SimpleNamespace(comm=SimpleNamespace(enable_quant_communications=False))
    scattered = SimpleNamespace(input_scattered=False)
    for name, value in (
        ("get_parallel", parallel),
        ("get_exec", exec_),
        ("get_attn_tp_context", scattered),
        ("is_dp_attention_enabled", False),
        ("_is_supported_forward_mode", True),
    ):
        monkeypatch.setattr(cutedsl, name, lambda *_, value=value: value)
    boundary._say_declined.cache_clear()
    rows = torch.ones(2, 64).bfloat16()
    batch = SimpleNamespace(forward_mode=1)
    asked: list[Any] = []

    def run(norm: Any) -> Any:
        fusion = cutedsl.CuteDSLFusion()
        fusion.service = SimpleNamespace(
            supports=lambda rows: True,
            all_reduce_residual_rms_norm=lambda **given: asked.append(given["gamma"]) or "fused",
        )
        whole = SimpleNamespace(sharded=())
        plan = SimpleNamespace(norm=norm)
        plan.fused_input_rows = plan.fusion_rows = lambda batch: whole
        (method,) = (getattr(fusion, name) for name in names if hasattr(fusion, name))
        return method(plan, rows, rows, batch)

    with caplog.at_level(logging.WARNING, "sglang.gemma_fold"):
        assert run(norms["native"]) is None and asked == []
        assert run(norms["native"]) is None
    assert caplog.text.count("native norms run without them") == 1
    assert run(norms["stock"]) == "fused" and asked == [norms["stock"].gemma_weight]


def test_the_push_plane_declines_though_it_was_planned_before(
    norms: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last layer, too, may not defer to a final norm, which would read the rounded gain."""
    push = pytest.importorskip(f"{_FUSIONS}.custom_all_reduce_fusion")
    scattered = SimpleNamespace(input_scattered=False)
    exec_ = SimpleNamespace(comm=SimpleNamespace(enable_quant_communications=False))
    for name, value in (
        ("get_exec", exec_),
        ("get_attn_tp_context", scattered),
        ("is_in_breakable_cuda_graph", False),
        ("can_fuse_all_reduce", True),
    ):
        monkeypatch.setattr(push, name, lambda *_, value=value: value)
    mode = SimpleNamespace(is_decode=lambda: True)
    batch = SimpleNamespace(forward_mode=mode, can_run_tbo=False, input_ids=torch.ones(2))
    fusion = push.CustomAllReduceFusion(hidden_size=64, defers_finalize=True)
    layer = torch.nn.Module()
    layer.__dict__["ffn_boundary"] = SimpleNamespace(fusions=fusion)

    def defers(norm: Any) -> bool:
        whole = SimpleNamespace(sharded=())
        plan = SimpleNamespace(norm=norm, terminal=True, fused_input_rows=lambda batch: whole)
        return bool(fusion.can_defer_finalize(plan, batch))

    assert push.install_terminal_finalize([layer], norms["native"]) is None
    assert push.install_terminal_finalize([layer], norms["stock"]) is fusion
    assert defers(norms["stock"]) and not defers(norms["native"])


def test_quantized_outputs_are_declined(norms: dict[str, Any]) -> None:
    """On AMD, where SGLang would go on with the gain in 16 bits."""
    from sglang.srt.layers import layernorm

    name = "_forward_with_allreduce_fusion_quant_per_group"
    if not hasattr(layernorm, name):
        pytest.skip("this version has no such fusion")
    hooked = getattr(layernorm, name)
    assert hooked.__wrapped__.__name__ == name
    rows = torch.ones(2, 64).bfloat16()
    called = []
    assert boundary.decline(lambda *a: called.append(a), norms["native"], rows, rows, rows) is None
    assert called == []
    assert boundary.decline(lambda *a: "fused", norms["stock"], rows, rows, rows) == "fused"
