"""Layers that hand a norm's input to the next norm: which ones may, and which look at it.

The oracle runs a mutant twice in numbers: with norms that each do their work, and with norms that
hand on. Where handing on is allowed, both have to give the same.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import handed_mutants
import pytest
import torch
from torch import Tensor

from gemma_fold.engines.attach.handed import (
    block_problem,
    layer_problem,
    methods_of,
    model_problem,
)

#: Below this a change of the generator has gone wrong.
FEWEST = 200
ENGINES = {
    "vllm-gemma2": ("vllm", "model_executor/models/gemma2.py", "Gemma2DecoderLayer"),
    "vllm-gemma3": ("vllm", "model_executor/models/gemma3.py", "Gemma3DecoderLayer"),
    "sglang-gemma2": ("sglang", "srt/models/gemma2.py", "Gemma2DecoderLayer"),
    "sglang-gemma3": ("sglang", "srt/models/gemma3_causal.py", "Gemma3DecoderLayer"),
}


class Numbers:
    """A stand-in for a layer that computes; `handed` says how its norms work."""

    training = False

    def __init__(self, number: int, handed: bool, before: Numbers | None) -> None:
        self.number, self.handed, self.before = number, handed, before
        self.seen: list[Tensor] = []

    def block(self, factor: float) -> Any:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() == 2)
            self.seen.append(x.clone())
            return (x * factor).roll(1, -1)

        part = _Callable(run)
        part.is_sliding = bool(self.number % 2)  # type: ignore[attr-defined]
        return part

    def __getattr__(self, name: str) -> Any:
        number = self.__dict__["number"]
        if name == "self_attn":
            return self.block(1.5 + number)
        if name == "mlp":
            return self.block(0.5 + number)
        if name.startswith("post_"):
            return self.post(name)
        post = {
            "pre_feedforward_layernorm": (self, "post_attention_layernorm"),
            "input_layernorm": (self.before, "post_feedforward_layernorm"),
        }
        if name not in post:
            raise AttributeError(name)
        owner, other = post[name]
        return self.pre(name, owner.real_post(other) if owner is not None else None)

    def real_post(self, name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: normed(x, len(name) + self.number)

    def post(self, name: str) -> Callable[[Tensor], Tensor]:
        return (lambda x: x) if self.handed else self.real_post(name)

    def pre(self, name: str, post: Callable[[Tensor], Tensor] | None) -> Callable[..., Any]:
        def norm(x: Tensor, residual: Tensor | None = None) -> Any:
            if residual is None:
                return normed(x, len(name) + self.number)
            x = post(x) if self.handed and post is not None else x
            return normed(x + residual, len(name) + self.number), x + residual

        return norm


class _Callable(SimpleNamespace):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__(run=run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def normed(x: Tensor, seed: int) -> Tensor:
    gain = torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(seed)) + 0.5
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * gain.double()


def outcome(mutant: handed_mutants.Mutant, handed: bool) -> Any:
    """What two layers in a row make, with the norm after them, or the kind of error."""
    forward = mutant.function()
    names = list(handed_mutants.ast.unparse(mutant.tree.args).replace(" ", "").split(","))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
    layers: list[Numbers] = []
    residual, results = None, []
    try:
        for number in range(2):
            layers.append(Numbers(number, handed, layers[-1] if layers else None))
            given = dict.fromkeys(
                (n.partition("=")[0] for n in names[1:] if not n.startswith("*")), None
            )
            hidden, rest = incoming(mutant.tree)
            given |= {hidden: x.clone() if number == 0 else x, rest: residual}
            x, residual = forward(layers[-1], **given)
        last = layers[-1].real_post("post_feedforward_layernorm")
        results = [*(t for layer in layers for t in layer.seen), residual]
        return [*results, normed((last(x) if handed else x) + residual, 99)]
    except Exception as error:
        return type(error)


def incoming(tree: Any) -> tuple[str, str]:
    """The arguments that the first norm is given, by the source."""
    ast = handed_mutants.ast
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "input_layernorm"
            and len(node.args) == 2
        ):
            return node.args[0].id, node.args[1].id
    raise LookupError("no call of the first norm")


def same(one: Any, two: Any) -> bool:
    if isinstance(one, type) or isinstance(two, type):
        return one is two
    return len(one) == len(two) and all(map(torch.equal, one, two))


def check(tree: Any) -> None:
    plain = outcome(handed_mutants.Mutant("plain", "full", tree), handed=False)
    assert not isinstance(plain, type)
    made = handed_mutants.mutants(tree)
    assert len(made) >= FEWEST and len({mutant.name for mutant in made}) == len(made)
    wrong, refused, other = [], 0, 0
    for mutant in made:
        problem = layer_problem({"forward": mutant.function()}, "sandwich")
        before, after = outcome(mutant, handed=False), outcome(mutant, handed=True)
        refused += bool(problem)
        other += not same(before, after)
        if not problem and not same(before, after):
            wrong.append(f"{mutant.name}: allowed, and gives other values")
        if problem and mutant.expect == "full":
            wrong.append(f"{mutant.name}: refused: {problem}")
        if not problem and mutant.expect == "less":
            wrong.append(f"{mutant.name}: allowed")
    print(
        f"{len(made)} mutants, {refused} refused, {other} that handing on would change, "
        f"{len(wrong)} wrong"
    )
    assert not wrong, "\n".join(wrong)
    assert other > 30 and refused >= other


def test_every_mutant() -> None:
    check(handed_mutants.own())


@pytest.mark.engine
@pytest.mark.parametrize("name", ENGINES)
def test_every_mutant_of_an_engines_own_layer(name: str) -> None:
    package, path, cls = ENGINES[name]
    spec = importlib.util.find_spec(package)
    file = Path(spec.submodule_search_locations[0], path) if spec else Path("absent")  # type: ignore[index]
    if not file.is_file():
        pytest.skip(f"{package} is not installed here")
    check(handed_mutants.installed(file, cls))


@pytest.mark.engine
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_vllms_own_classes_by_structure_alone(name: str) -> None:
    pytest.importorskip("vllm.model_executor", exc_type=ImportError)
    import vllm.model_executor.models as models

    from gemma_fold.engines.known_code import VLLM

    family = next(one for one in VLLM if one.module == name)
    module = importlib.import_module(f"{models.__name__}.{name}")
    assert model_problem(methods_of(getattr(module, family.model))) == ""
    assert layer_problem(methods_of(getattr(module, family.layer)), family.layout) == ""


class TestModels:
    def test_a_plain_loop(self) -> None:
        def forward(self: Any, ids: Any) -> Any:
            x, residual = self.embed(ids), None
            for layer in self.layers[:]:
                x, residual = layer(ids, x, residual)
            x, _ = self.norm(x, residual)
            return x

        assert model_problem({"forward": forward}) == ""

    def test_hidden_states_kept_between_layers(self) -> None:
        def forward(self: Any, ids: Any) -> Any:
            x, residual, kept = self.embed(ids), None, []
            for layer in self.layers:
                x, residual = layer(x, residual)
                kept.append(x)
            return self.norm(x, residual)[0], kept

        assert "not through its last norm" in model_problem({"forward": forward})

    def test_hidden_states_changed_between_layers(self) -> None:
        def forward(self: Any, ids: Any, extra: Any) -> Any:
            x, residual = self.embed(ids), None
            for layer in self.layers:
                x, residual = layer(x, residual)
                if extra:
                    x = x + extra
            return self.norm(x, residual)[0]

        assert "layer 0 goes into add" in model_problem({"forward": forward})

    def test_the_residual_of_another_layer(self) -> None:
        def forward(self: Any, ids: Any) -> Any:
            x = residual = self.embed(ids)
            for layer in self.layers:
                x, _ = layer(x, residual)
            return self.norm(x, residual)[0]

        assert "residual" in model_problem({"forward": forward})

    def test_no_last_norm(self) -> None:
        def forward(self: Any, ids: Any) -> Any:
            x, residual = self.embed(ids), None
            for layer in self.layers:
                x, residual = layer(x, residual)
            return x

        assert model_problem({"forward": forward})


class TestBlocks:
    def test_both_ways_of_a_branch(self) -> None:
        def forward(self: Any, x: Any) -> Any:
            out, _ = self.o_proj(self.attn(x))
            return out

        def scaled(self: Any, x: Any) -> Any:
            out, _ = self.o_proj(self.attn(x))
            return out * 2 if self.scale else out

        assert block_problem({"forward": forward}, "o_proj") == ""
        assert "goes into mul" in block_problem({"forward": scaled}, "o_proj")
        plain = SimpleNamespace(scale=False)  # what the module itself says decides
        assert block_problem({"forward": scaled}, "o_proj", plain) == ""

    def test_a_method_of_its_own(self) -> None:
        def forward(self: Any, x: Any) -> Any:
            return self.inner(x)

        def inner(self: Any, x: Any) -> Any:
            return self.o_proj(x)[0].contiguous()

        found = block_problem({"forward": forward, "inner": inner}, "o_proj")
        assert found == "the output of o_proj has its .contiguous read"

    def test_too_many_branches(self) -> None:
        def forward(self: Any, x: Any) -> Any:
            for one in range(9):
                if x == one:
                    x = x + 1
            return self.o_proj(x)[0]

        assert "too many branches" in block_problem({"forward": forward}, "o_proj")
