"""Layers are fused by the structure of their code, proved by running them, and never silently."""

from __future__ import annotations

import ast
import copy
import functools
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fused_counts
import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn

import gemma_fold
import gemma_fold.engines.transformers.plugin
from gemma_fold.commands.convert import convert
from gemma_fold.engines.attach import code, prove
from gemma_fold.engines.mode import Missing, Report, announce
from gemma_fold.engines.transformers import layers as sandwich
from gemma_fold.engines.transformers.norms import FoldedNorm
from gemma_fold.errors import UnsupportedModelError, UsageError

IDS = torch.randint(3, 88, (2, 9), generator=torch.Generator().manual_seed(0))
SANDWICHES = fused_counts.IN_TRANSFORMERS | {
    "paligemma": 0,
    "recurrent_gemma": 0,
    "qwen3_next": 0,
}


def fused(model: nn.Module) -> int:
    return sum(
        prove.plan(module.shape).fused
        for module in model.modules()
        if isinstance(module, sandwich.SandwichLayer)
    )


def gemma3(dtype: torch.dtype = torch.bfloat16) -> Any:
    return tiny.build("gemma3_text", dtype)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.INFO, logger="gemma_fold"):
        yield lambda: [record.getMessage() for record in caplog.records]


class TestWhatIsFused:
    @pytest.mark.parametrize("family", [f for f in SANDWICHES if f in tiny.available()])
    def test_every_sandwich_of_a_family(self, family: str) -> None:
        model = gemma_fold.fold_model(tiny.build(family))
        assert fused(model) == SANDWICHES[family]

    @pytest.mark.parametrize("family", ["gemma3_text", "t5gemma"])
    def test_they_run_as_one_operator(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = gemma_fold.fold_model(tiny.build(family, torch.bfloat16))
        calls = []
        real = sandwich.ops.rms_norm_add_rms_norm

        def counted(*args: Any) -> Any:
            calls.append(args)
            return real(*args)

        monkeypatch.setattr(sandwich.ops, "rms_norm_add_rms_norm", counted)
        with torch.no_grad():
            model(**tiny.inputs(family, torch.bfloat16))
        ends = 2 if family == "t5gemma" else 1  # the last layer's sum goes to the final norm
        assert len(calls) == SANDWICHES[family] - ends

    def test_a_dropout_that_drops_is_not_passed_over(self) -> None:
        results = []
        for fold in (False, True):
            model = tiny.build("t5gemma").train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.5
            if fold:
                gemma_fold.fold_model(model)
            torch.manual_seed(5)
            results.append(model(**tiny.inputs("t5gemma")).logits)
        assert torch.equal(*results)

    def test_hidden_states_changed_between_two_layers(self) -> None:
        # In place and without a hook: the layer before has normed what they were.
        results = []
        for fold in (False, True):
            model = gemma3()
            if fold:
                gemma_fold.fold_model(model)
            first, second = model.model.layers
            x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
            rotary = model.model.rotary_emb
            with torch.no_grad():
                kinds = model.config.layer_types
                positions = torch.arange(3)[None]
                x = first(x, position_embeddings=rotary(x, positions, kinds[0]))
                x.mul_(2)
                results.append(second(x, position_embeddings=rotary(x, positions, kinds[1])))
        assert torch.equal(*results)

    def test_in_inference_mode(self) -> None:
        model = gemma3()
        with torch.inference_mode():
            expected = model(input_ids=IDS).logits
            gemma_fold.fold_model(model)
            found = model(input_ids=IDS).logits
        assert torch.equal(expected, found)

    def test_no_version_in_the_table_has_less(self) -> None:
        rows = json.loads(fused_counts.RESULTS.read_text())
        assert {row["engine"] for row in rows} == {"transformers", "vllm", "sglang"}
        for row in rows:
            assert row["fused"] == row["expected"] and row["level"] != "other bits", row

    def test_the_table_is_what_this_version_gives(self) -> None:
        found = {row["family"]: row for row in fused_counts.rows() if row["level"] != "read"}
        assert set(found) == {f for f in fused_counts.IN_TRANSFORMERS if f in tiny.available()}
        for row in json.loads(fused_counts.RESULTS.read_text()):
            if (row["engine"], row["version"]) == ("transformers", transformers.__version__):
                assert row == found[row["family"]]


class TestTheFunction:
    def test_what_is_around_it_stays(self) -> None:
        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.__hidden = 3

            @_noted
            def forward(self, x: int, *, scale: int = 2) -> tuple[Any, ...]:
                """Doubles."""
                return x * scale, self.__hidden, super().extra_repr(), outer

        outer = object()
        read = code.read(Layer.forward)
        again = code.rebuilt(read, read.tree)
        assert again is not Layer.forward
        assert again(Layer(), 4) == Layer().forward(4) == (8, 3, "", outer)
        assert again.__doc__ == "Doubles." and again.__qualname__ == Layer.forward.__qualname__
        assert _NOTES[-1] == "forward"

    def test_a_changed_statement_is_what_runs(self) -> None:
        read = code.read(_plus_one)
        tree = copy.deepcopy(read.tree)
        tree.body = ast.parse("return x + 2").body
        assert code.rebuilt(read, tree)(5) == 7
        assert _plus_one(5) == 6

    def test_a_source_that_is_not_what_runs(self, tmp_path: Path) -> None:
        file = tmp_path / "edited.py"
        file.write_text("def f(x):\n    return x + 1\n")
        names: dict[str, Any] = {}
        exec(compile(file.read_text(), str(file), "exec"), names)
        assert code.read(names["f"])
        file.write_text("def f(x):\n    return x + 22\n")
        import linecache

        linecache.checkcache()
        with pytest.raises(code.Unreadable, match="not the code that runs"):
            code.read(names["f"])

    def test_no_source_at_all(self) -> None:
        names: dict[str, Any] = {}
        exec("def f(x):\n    return x", names)
        with pytest.raises(code.Unreadable, match="source"):
            code.read(names["f"])


_NOTES: list[str] = []


def _noted(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _NOTES.append(function.__name__)
        return function(*args, **kwargs)

    return wrapper


def _plus_one(x: int) -> int:
    return x + 1


class TestTheProof:
    """Given a fused form that is wrong, running it has to tell."""

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda total, normed: [total, normed * 1.0078125],
            lambda total, normed: [total + 2**-6, normed],
            lambda total, normed: [normed, total],
            lambda total, normed: [total.float(), normed],
            lambda total, normed: [total[:, :1], normed],
        ],
    )
    def test_other_values(self, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = gemma_fold.fold_model(gemma3()).model.layers[0]
        shape = layer.shape
        sandwich.split_layers(nn.ModuleList([layer]))
        plan = prove.plan(shape)
        cls = sandwich._fused_class(shape)
        assert prove.differs(layer, plan.tree, cls, sandwich._link) == ""
        real = sandwich._sandwich
        monkeypatch.setattr(sandwich, "_sandwich", lambda *args: wrong(*real(*args)))
        assert "fused form" in prove.differs(layer, plan.tree, cls, sandwich._link)

    def test_a_layer_that_fails_it_keeps_its_forward(
        self, monkeypatch: pytest.MonkeyPatch, said: Any
    ) -> None:
        monkeypatch.setattr(prove, "_proved", {})
        monkeypatch.setattr(prove, "differs", lambda *args: "it gives other values")
        model = gemma_fold.fold_model(gemma3())
        assert fused(model) == 0
        assert said()[-1].endswith(
            "0 of 4 sandwiches fused; Gemma3DecoderLayer.forward: it gives other values"
        )

    def test_nothing_of_the_program_is_disturbed(self) -> None:
        model = gemma3()
        prove._proved.clear()
        state = torch.get_rng_state()
        with torch.device("meta"):
            gemma_fold.fold_model(model)
        assert torch.equal(state, torch.get_rng_state())
        assert fused(model) == 4


class TestWhatIsSaid:
    def test_one_line_at_load(self, tmp_path: Path, said: Any) -> None:
        tiny.save("gemma3_text", tmp_path / "source", torch.bfloat16)
        convert(tmp_path / "source", tmp_path / "folded")
        gemma_fold.load(tmp_path / "folded")
        assert said() == [
            f"gemma-fold: transformers {transformers.__version__}: 13 norms folded, "
            "4 of 4 sandwiches fused"
        ]

    def test_a_family_without_sandwiches(self, said: Any) -> None:
        gemma_fold.fold_model(tiny.build("gemma"))
        assert said()[-1].endswith(": 5 norms folded")

    def test_it_reaches_stderr_without_any_setup(self) -> None:
        script = (
            "from gemma_fold.engines.mode import Report, announce\n"
            "announce(Report('engine 1', 3, 1, 2))"
        )
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        line = "gemma-fold: engine 1: 3 norms folded, 1 of 2 sandwiches fused\n"
        assert (run.stdout, run.stderr) == ("", line)

    def test_require(self, monkeypatch: pytest.MonkeyPatch, said: Any) -> None:
        monkeypatch.setenv("GEMMA_FOLD", "require")
        gemma_fold.fold_model(gemma3())
        short = Report("engine 1", 3, 1, 2, (Missing("Layer.forward", "norm", "it is not called"),))
        with pytest.raises(
            UnsupportedModelError, match=r"norm: it is not called; .*unset"
        ) as error:
            announce(short)
        assert error.value.exit_code == 3
        monkeypatch.setenv("GEMMA_FOLD", "native")
        announce(short)
        monkeypatch.setenv("GEMMA_FOLD", "requird")
        with pytest.raises(UsageError, match="requird"):
            announce(short)


class TestWhatUsersDo:
    @pytest.mark.parametrize("how", ["wrapped", "replaced", "before folding"])
    def test_a_followers_first_norm_is_another_module(self, how: str) -> None:
        class Wrapped(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x) * 2

        results = []
        for fold in (False, True):
            model = gemma3()
            layer = model.model.layers[1]
            if fold and how != "before folding":
                gemma_fold.fold_model(model)
            if how == "replaced":
                layer.input_layernorm = nn.Identity()
            else:
                layer.input_layernorm = Wrapped(layer.input_layernorm)
            if fold and how == "before folding":
                gemma_fold.fold_model(model)
            results.append(logits(model))
        assert torch.equal(*results)

    @pytest.mark.parametrize("family", ["gemma3_text", "nemotron", "moonshine_streaming"])
    def test_an_epsilon_changed_after_folding(self, family: str) -> None:
        results = []
        for fold in (False, True):
            model = tiny.build(family)
            inputs = tiny.inputs(family)
            before = _first(model, inputs)
            if fold:
                gemma_fold.fold_model(model)
            for module in model.modules():
                if "Norm" in type(module).__name__ and hasattr(module, "eps"):
                    module.eps = 0.5
            results.append(_first(model, inputs))
            assert not torch.equal(before, results[-1])
        assert torch.equal(*results)

    def test_a_parametrized_norm(self) -> None:
        class Doubled(nn.Module):
            def forward(self, gamma: Tensor) -> Tensor:
                return gamma * 2

        model = gemma_fold.fold_model(gemma3())
        norms = [m for m in model.modules() if isinstance(m, FoldedNorm)]
        for norm in norms:
            torch.nn.utils.parametrize.register_parametrization(norm, norm.gain_name, Doubled())
        found = logits(model)
        with pytest.raises(UnsupportedModelError, match="parametrization"):
            gemma_fold.unfold_model(model)
        plain = gemma_fold.fold_model(gemma3())
        with torch.no_grad():
            for norm in plain.modules():
                if isinstance(norm, FoldedNorm):
                    norm.gain.mul_(2)
        assert torch.equal(found, logits(plain))

    def test_a_kernel_that_would_add_the_offset_again(self) -> None:
        model = gemma_fold.fold_model(gemma3())
        with pytest.raises(UnsupportedModelError, match=r"twice.*rms_norm=False"):
            model.model.norm.offset = 1.0
        model.model.norm.offset = 0.0

    @pytest.mark.slow  # a process that imports Liger
    def test_ligers_own_patch(self) -> None:
        # In a process of its own: it also changes functions of transformers.
        script = """
import tiny, torch, gemma_fold
from transformers.integrations.liger import apply_liger_kernel
model = gemma_fold.fold_model(tiny.build("gemma3_text"))
ids = torch.arange(3, 12)[None]
expected = model(ids).logits
off = {"rope": False, "geglu": False, "fused_linear_cross_entropy": False}  # they need a GPU
apply_liger_kernel(model, {**off, "rms_norm": False})
assert torch.equal(expected, model(ids).logits)
try:
    apply_liger_kernel(model, off)
except gemma_fold.GemmaFoldError as error:
    print(error)
"""
        command = [sys.executable, "-c", script]
        run = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(tiny.__file__).parent
        )
        assert "Liger: rms_norm=False" in run.stdout, run.stderr


def _first(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return next(iter(model(**inputs).values()))
