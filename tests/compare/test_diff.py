"""`diff` without running models: every class of difference, made for real, and its report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, gemma3_tensors, is_norm, read_tensors, tree, write_checkpoint
from commands import run_here
from hubserver import HubServer
from safetensors.numpy import save_file

from gemma_fold.checkpoint.header import TensorEntry, render_header
from gemma_fold.commands.convert import convert
from gemma_fold.compare import DiffLimits, DiffOptions, diff
from gemma_fold.compare.report.writers import SCHEMA, markdown, text, to_json
from gemma_fold.compare.sides import open_side
from gemma_fold.compare.structure import compare_structure
from gemma_fold.compare.weights.norms import BUCKETS, TensorClass, ulp_distance
from gemma_fold.compare.weights.tensors import compare_weights
from gemma_fold.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
BF16 = ml_dtypes.bfloat16
WEIGHTS = DiffOptions(outputs=False)
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("a") / "model")


@pytest.fixture(scope="module")
def folded(original: Path) -> Path:
    out = original.parent / "folded"
    convert(original, out)
    return out


def variant(source: Path, out: Path, change: Callable[[str, Array], Array]) -> Path:
    """A copy of `source` whose tensors went through `change`."""
    shutil.copytree(source, out)
    tensors = {name: change(name, tensor) for name, tensor in read_tensors(source).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def on_norms(change: Callable[[Array], Array]) -> Callable[[str, Array], Array]:
    return lambda name, tensor: change(tensor) if is_norm(name) else tensor


def toward_zero(gamma: Array) -> Array:
    return (gamma.view(np.uint32) & 0xFFFF0000).view(np.float32)


#: What is done to the right gamma -> the class of it, and the remark.
WRONG_FOLDS: dict[str, tuple[Callable[[Array], Array], TensorClass, str]] = {
    "as it is": (lambda g: g, TensorClass.EXACT_FOLD, ""),
    "[H] without the lock": (lambda g: g.reshape(-1), TensorClass.EXACT_FOLD, ""),
    "stored as bf16": (lambda g: g.astype(BF16), TensorClass.ROUNDED_FOLD, "rounded to bf16$"),
    "rounded to bf16": (
        lambda g: g.astype(BF16).astype(np.float32),
        TensorClass.ROUNDED_FOLD,
        "rounded to bf16$",
    ),
    "stored as fp16": (
        lambda g: g.astype(np.float16),
        TensorClass.ROUNDED_FOLD,
        "rounded to fp16",
    ),
    "truncated": (toward_zero, TensorClass.ROUNDED_FOLD, "bf16, toward zero"),
    "one element rounded": (
        lambda g: np.concatenate([g[:-1], g[-1:].astype(BF16).astype(np.float32)]),
        TensorClass.ROUNDED_FOLD,
        "rounded to bf16",
    ),
    "folded twice": (lambda g: g + np.float32(1), TensorClass.DOUBLE_FOLDED, "2 \\+ w"),
    "folded twice in bf16": (
        lambda g: (g.astype(BF16) + BF16(1)).astype(BF16),
        TensorClass.DOUBLE_FOLDED,
        "2 \\+ w",
    ),
    "not folded": (lambda g: g * 0, TensorClass.NOT_FOLDED, "holds w"),
    "scaled": (lambda g: g * np.float32(1.01), TensorClass.UNEXPECTED, "no fold of it"),
}


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An original whose every gamma needs more bits than bf16 and fp16 have, and its fold."""
    rng = np.random.default_rng(3)

    def weights(shape: tuple[int, ...]) -> Array:
        bits = rng.uniform(0.02, 0.03, shape).astype(BF16).view(np.uint16) | 1
        return bits.view(BF16)

    norms = {n: weights(t.shape) if is_norm(n) else t for n, t in gemma3_tensors().items()}
    source = write_checkpoint(tmp_path_factory.mktemp("rough") / "model", norms)
    convert(source, source.parent / "folded")
    return source, source.parent / "folded"


@pytest.mark.parametrize("case", WRONG_FOLDS)
def test_every_wrong_fold_is_named(case: str, rough: tuple[Path, Path], tmp_path: Path) -> None:
    source, right = rough
    change, expected, remark = WRONG_FOLDS[case]
    weights = read_tensors(source)

    def edit(name: str, tensor: Array) -> Array:
        if not is_norm(name):
            return tensor
        if case == "not folded":
            return weights[name].astype(np.float32).reshape(-1, 1)
        return np.ascontiguousarray(change(tensor))

    other = variant(right, tmp_path / "other", edit)
    for a, b, who in ((source, other, "B"), (other, source, "A")):
        found = diff(str(a), str(b), WEIGHTS)
        assert found.weights is not None
        assert found.weights.counts == {TensorClass.IDENTICAL: 7, expected: 19}
        for tensor in found.weights.norms:
            assert re.search(remark, tensor.remark)
            if not expected.same and expected is not TensorClass.UNEXPECTED:
                assert tensor.remark.startswith(f"{who} ")
        assert found.verdict.same is expected.same


def test_an_original_that_holds_gamma_is_double_folded_by_its_loaders(
    original: Path, tmp_path: Path
) -> None:
    unmarked = variant(original, tmp_path / "b", on_norms(lambda w: (w + BF16(1)).astype(BF16)))
    found = diff(str(original), str(unmarked), WEIGHTS)
    assert found.weights is not None
    assert found.weights.counts[TensorClass.DOUBLE_FOLDED] == 19
    assert not found.verdict.same and "not marked as folded" in found.verdict.line


def test_two_originals_and_two_folded_checkpoints(
    original: Path, folded: Path, tmp_path: Path
) -> None:
    for side in (original, folded):
        found = diff(str(side), str(shutil.copytree(side, tmp_path / side.name)), WEIGHTS)
        assert found.weights is not None
        assert found.weights.counts == {TensorClass.IDENTICAL: 26}
        assert found.weights.compared == sum(t.nbytes for t in read_tensors(side).values())
        assert found.verdict.same
    # One bit of one weight: no fold explains it between two originals.
    changed = variant(
        original,
        tmp_path / "changed",
        lambda n, t: np.nextafter(t, BF16(9)) if n == "model.norm.weight" else t,
    )
    found = diff(str(original), str(changed), WEIGHTS)
    assert found.weights is not None
    listed = (*found.weights.norms, *found.weights.others)
    (tensor,) = (t for t in listed if t.found is TensorClass.UNEXPECTED)
    assert tensor.name == "model.norm.weight" and not found.verdict.same


def test_numbers_of_a_rounded_fold_against_numpy(
    original: Path, folded: Path, tmp_path: Path
) -> None:
    rounded = variant(folded, tmp_path / "b", on_norms(lambda g: g.astype(BF16).astype(np.float32)))
    weights = compare_weights(open_side(original), open_side(rounded))
    assert len(weights.norms) == 19
    for tensor in weights.norms:
        stats = tensor.norm
        assert stats is not None
        w = read_tensors(original)[tensor.name].astype(np.float64)
        exact = (1 + w).astype(np.float32)
        stored = exact.astype(BF16).astype(np.float32)
        error = np.abs(stored.astype(np.float64) - exact)
        steps = [count_steps(x, y) for x, y in zip(exact, stored, strict=True)]
        assert stats.elements == w.size
        assert stats.changed == np.count_nonzero(error)
        assert stats.max_abs == error.max()
        known = exact != 0
        relative = error[known] / np.abs(exact[known].astype(np.float64))
        assert stats.max_rel == pytest.approx(relative.max(), rel=1e-12)
        assert stats.max_ulp == max(steps)
        expected = np.zeros(BUCKETS, int)
        for count in steps:
            expected[count.bit_length()] += 1
        assert list(stats.histogram) == list(expected)
        for spread, values in (
            (stats.gamma_a, exact),
            (stats.gamma_b, stored),
            (stats.w, exact - np.float32(1)),
        ):
            assert (spread.min, spread.max) == (values.min(), values.max())
            assert spread.mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-12)
    assert weights.elements == sum(t.norm.elements for t in weights.norms if t.norm)
    assert sum(weights.histogram) == weights.elements


def count_steps(a: np.float32, b: np.float32) -> int:
    """Float32 numbers from a to b, of one sign, a binade at a time."""
    low, high = sorted((abs(float(a)), abs(float(b))))
    total = 0.0
    while low < high:
        end = min(high, 2.0 ** (np.floor(np.log2(low)) + 1))
        total += (end - low) / float(np.spacing(np.float32(low)))
        low = end
    return round(total)


def test_ulp_distance_counts_float32_numbers() -> None:
    one = np.float32(1)
    pairs = [
        (one, one, 0),
        (one, np.nextafter(one, np.float32(2)), 1),
        (one, np.float32(2), 2**23),
        (np.float32(0.0), np.float32(-0.0), 0),
        (np.float32(-1e-45), np.float32(1e-45), 2),  # the smallest numbers around zero
        (-one, np.nextafter(-one, np.float32(0)), 1),
    ]
    a, b, expected = (np.array(column) for column in zip(*pairs, strict=True))
    distance = ulp_distance(a.astype(np.float32), b.astype(np.float32))
    assert list(distance) == list(expected)


def test_other_tensors_that_differ(original: Path, tmp_path: Path) -> None:
    embedding = "model.embed_tokens.weight"

    def edit(name: str, tensor: Array) -> Array:
        if name == embedding:
            tensor = tensor.copy()
            tensor[3, 5:7] = BF16(1000)
        return tensor.astype(np.float32) if name.endswith("up_proj.weight") else tensor

    found = diff(str(original), str(variant(original, tmp_path / "b", edit)), WEIGHTS)
    assert found.weights is not None and found.structure is not None
    others = {tensor.name: tensor for tensor in found.weights.others}
    before = read_tensors(original)[embedding][3, 5:7].astype(np.float64)
    assert others[embedding].changed == 2
    assert others[embedding].max_abs == pytest.approx(np.abs(1000 - before).max())
    recast = others["model.layers.0.mlp.up_proj.weight"]
    assert recast.changed == 0 and recast.remark.endswith("equal values")
    assert len(others) == 4 and not found.verdict.same
    assert {change.name for change in found.structure.forms} == set(others) - {embedding}


# --- structure -----------------------------------------------------------------------------------


def test_structure_of_a_fold_has_no_differences(
    original: Path, folded: Path, tmp_path: Path
) -> None:
    found = compare_structure(open_side(original), open_side(folded))
    assert found.same and found.tensors == 26 and found.folded_forms == 19
    assert found.vocabulary == (32, 32)
    sharded = write_checkpoint(tmp_path / "sharded", shards=3)
    found = compare_structure(open_side(sharded), open_side(folded))
    assert found.same and len(found.moved) == 26


def test_structure_names_what_differs(original: Path, tmp_path: Path) -> None:
    tensors = gemma3_tensors()
    del tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.extra.weight"] = np.zeros((2, 3), np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((5, 25), BF16)
    config = {**CONFIG, "rms_norm_eps": 1e-5, "transformers_version": "5.0", "rope": {"theta": 1.0}}
    del config["torch_dtype"]
    config["dtype"] = "bfloat16"  # the same setting, as transformers spells it now
    other = write_checkpoint(tmp_path / "b", tensors, config)
    (other / "chat_template.jinja").write_text("another")
    (other / "generation_config.json").write_text('{"do_sample": null}\n')
    found = diff(str(original), str(other), WEIGHTS)
    structure = found.structure
    assert structure is not None and found.weights is not None
    assert structure.only_in_a == ("model.layers.2.mlp.up_proj.weight",)
    assert structure.only_in_b == ("model.extra.weight",)
    (form,) = structure.forms
    assert (form.a, form.b) == ("BF16 [5, 24]", "BF16 [5, 25]")
    assert {c.name: (c.a, c.b) for c in structure.config} == {
        "rms_norm_eps": ("1e-06", "1e-05"),
        "rope.theta": ("(absent)", "1.0"),
    }
    assert [c.name for c in structure.config_notes] == ["transformers_version"]
    assert [c.name for c in structure.files] == ["chat_template.jinja"]
    assert found.weights.files == ("generation_config.json",)  # of the same size
    reasons = " / ".join(found.verdict.reasons)
    assert "only in A" in reasons and "only in B" in reasons and "config keys differ" in reasons


def sparse_checkpoint(folder: Path, layers: int, rows: int) -> Path:
    """Headers that describe far more data than any disk has; the files are holes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    weight_map = {}
    for layer in range(layers):
        entries = []
        position = 0
        names = {f"model.layers.{layer}.{n}_proj.weight": (rows, 8192) for n in ("up", "down")}
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            names[f"model.layers.{layer}.{norm}_layernorm.weight"] = (8192,)
        for name, shape in names.items():
            size = 2 * int(np.prod(shape, dtype=object))
            entries.append(TensorEntry(name, "BF16", shape, position, position + size))
            position += size
        raw = render_header(entries, None)
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        with open(folder / file, "wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + position)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_structure_only_reads_headers_of_any_size(tmp_path: Path) -> None:
    a = sparse_checkpoint(tmp_path / "a", 60, 1 << 22)  # 60 files of 137 GB: none can be read
    b = sparse_checkpoint(tmp_path / "b", 60, 1 << 22)
    found = diff(str(a), str(b), DiffOptions(structure_only=True))
    assert found.verdict.same and found.weights is None and found.outputs is None
    assert found.structure is not None and found.structure.tensors == 360
    c = sparse_checkpoint(tmp_path / "c", 60, 1 << 21)
    found = diff(str(a), str(c), DiffOptions(structure_only=True))
    assert found.structure is not None and len(found.structure.forms) == 120
    assert not found.verdict.same


def test_structure_of_a_hub_id_downloads_no_weights(
    original: Path, folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = gemma3_tensors() | {"model.big.weight": np.zeros((1 << 20,), np.float32)}
    big = write_checkpoint(tmp_path / "big", tensors)
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        commit = hub.add("org/big", big)
        found = diff("org/big", str(folded), DiffOptions(structure_only=True))
        assert found.a.commit == commit and found.structure is not None
        assert found.structure.only_in_a == ("model.big.weight",)
        assert found.structure.folded_forms == 19
        assert hub.sent["org/big/model.safetensors"] < 1 << 20
        hub.add("org/model", original)
        whole = diff("org/model", str(folded), WEIGHTS)
        assert whole.verdict.same and whole.weights is not None
        from huggingface_hub import close_session

        close_session()


@pytest.mark.slow
def test_bytes_are_streamed(tmp_path: Path) -> None:
    sides = []
    for name in ("a", "b"):
        folder = sparse_checkpoint(tmp_path / name, 1, 8192)  # 128 MiB a tensor
        sides.append(open_side(folder))
    last = sorted((tmp_path / "b").glob("*.safetensors"))[-1]
    with open(last, "r+b") as file:
        file.seek(100 << 20)
        file.write(b"\1")
    tracemalloc.start()
    weights = compare_weights(*sides)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    (tensor,) = weights.others
    assert tensor.changed == 1 and weights.counts[TensorClass.IDENTICAL] == 5


def test_a_family_without_rules_is_compared_byte_by_byte(original: Path, tmp_path: Path) -> None:
    sides = []
    for name in ("a", "b"):
        config = {**CONFIG, "model_type": "gemma99", "architectures": ["Gemma99ForCausalLM"]}
        sides.append(write_checkpoint(tmp_path / name, config=config))
    found = diff(str(sides[0]), str(sides[1]), WEIGHTS)
    assert found.verdict.same and found.weights is not None and not found.weights.norms
    assert any("gemma99" in note for note in found.notes)


# --- limits, reports, the command ----------------------------------------------------------------


def test_max_ulp_tolerates_rounding_and_no_more(
    original: Path, folded: Path, tmp_path: Path
) -> None:
    rounded = variant(folded, tmp_path / "b", on_norms(lambda g: g.astype(BF16).astype(np.float32)))
    strict = diff(str(original), str(rounded), WEIGHTS)
    assert strict.weights is not None
    worst = strict.weights.max_ulp
    assert 0 < worst <= 1 << 15 and not strict.verdict.same
    for limit, same in ((worst, True), (worst - 1, False)):
        found = diff(
            str(original),
            str(rounded),
            DiffOptions(outputs=False, limits=DiffLimits(max_ulp=limit)),
        )
        assert found.verdict.same is same


def test_json_is_plain_and_complete(original: Path, folded: Path) -> None:
    found = diff(str(original), str(folded), WEIGHTS)
    value = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert value["schema"] == SCHEMA == 1 and value["same"] is True
    assert value["weights"]["counts"] == {"identical": 7, "exact fold": 19}
    assert len(value["weights"]["norms"]) == 19
    assert value["weights"]["norms"][0]["class"] == "exact fold"
    assert value["environment"]["numpy"] == np.__version__
    assert "torch" not in value["environment"]


def test_text_and_markdown_end_in_the_verdict(original: Path, folded: Path) -> None:
    found = diff(str(original), str(folded), WEIGHTS)
    lines = text(found).splitlines()
    assert lines[-1] == "same: 19 norms folded exactly, 7 tensors identical"
    assert any("input_layernorm.weight x3" in line and "exact fold" in line for line in lines)
    page = markdown(found)
    assert page.startswith("**same: ") and "| exact fold | 19 | 0 |" in page


class Page(HTMLParser):
    """Collects what a page would fetch, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.words: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_html_is_one_file_that_fetches_nothing(
    original: Path, folded: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    rounded = variant(
        folded, tmp_path / "<b> & co", on_norms(lambda g: g.astype(BF16).astype(np.float32))
    )
    out = tmp_path / "report.html"
    result = run_here("diff", original, rounded, "--no-outputs", "--html", out)
    assert result.returncode == 1, result.stderr
    page = Page()
    page.feed(out.read_text())
    assert all(link.startswith("#") for link in page.links)
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert "svg" in page.tags and "url(http" not in out.read_text()
    words = " ".join(page.words)
    assert "Differs" in words and "19 norms are folded with rounding" in words
    assert str(rounded) in words  # as text, not as markup


def test_the_command_and_its_exit_codes(original: Path, folded: Path, tmp_path: Path) -> None:
    same = run_here("diff", original, folded, "--no-outputs")
    assert (same.returncode, same.stderr) == (0, "")
    assert same.stdout.splitlines()[-1].startswith("same: ")
    double = variant(folded, tmp_path / "b", on_norms(lambda g: g + np.float32(1)))
    differs = run_here("diff", original, double, "--no-outputs", "--json")
    assert differs.returncode == 1
    value = json.loads(differs.stdout)
    assert value["verdict"] == (
        "differs: 19 norms are double-folded (B holds 2 + w: the offset was added twice)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("A", "nowhere/at/all", "--no-outputs"), "nowhere/at/all does not exist"),
        (("A", "A/config.json", "--no-outputs"), "is a file; give the folder"),
        (("A", "F", "--no-outputs", "--html", "missing/x.html"), "missing does not exist; make it"),
        (("A", "F", "--no-outputs", "--html", "A"), "is a folder; give a file name"),
        (("A", "F", "--no-outputs", "--html", "A/config.json"), "not written by diff"),
        (("A", "F", "--html", "A/model.safetensors"), "not written by diff"),
        (("A", "F", "--save-logits", "A/model.safetensors"), "not written by diff"),
        (("A", "F", "--save-logits", "missing/x"), "missing does not exist; make it first"),
        (("A", "F", "--engine", "llama"), "--engine llama is unknown"),
        (("A", "F", *["--engine", "transformers"] * 3), "at most two"),
        (("A", "F", "--engine", "vllm"), "vLLM is not installed; install it"),
        (("A", "F", "--engine", "sglang"), "SGLang is not installed; install it"),
        (("A", "F", "--engine", "sglang", "--device", "cpu"), "chooses the GPUs of sglang"),
        (("A", "F", "--structure-only", "--outputs"), "--structure-only compares the headers"),
        (("A", "http://127.0.0.1:1", "--no-outputs"), "only be compared by its outputs"),
        (("A", "http://127.0.0.1:1", "--logits", "x"), "servers, vLLM and SGLang return no logits"),
        (("A", "F", "--save-logits", "x", "--logits", "y"), "not both"),
        (("A", "F", "--no-outputs", "--logits", "y"), "leave out --no-outputs"),
        (("A", "F", "--context", "1"), "too short"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    original: Path,
    folded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"A": str(original), "F": str(folded)}
    names |= {f"A/{path.name}": str(path) for path in original.iterdir()}
    before = tree(original)
    result = run_here("diff", *(names.get(word, word) for word in arguments))
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(f"gemma-fold: .*{re.escape(message)}.*\n", result.stderr), result.stderr
    assert tree(original) == before


def test_a_later_format_and_a_lost_config_are_refused(folded: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folded, tmp_path / "b")
    config = json.loads((other / "config.json").read_text())
    for change, message in (
        ({"gemma_fold": {"format": 2}}, "later gemma-fold"),
        ({"base_config": None}, "lost its base_config"),
    ):
        (other / "config.json").write_text(json.dumps(config | change))
        result = run_here("diff", folded, other, "--no-outputs")
        assert result.returncode == 2 and message in result.stderr


def test_weights_are_compared_without_torch(original: Path, folded: Path) -> None:
    code = (
        "import sys; from gemma_fold.compare import DiffOptions, diff;"
        "from gemma_fold.compare.report import writers as report;"
        f"found = diff({str(original)!r}, {str(folded)!r}, DiffOptions(outputs=False));"
        "print(report.text(found));"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()) or not found.verdict.same)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_options_that_contradict_each_other_raise() -> None:
    with pytest.raises(UsageError, match="at most two"):
        diff("a", "b", DiffOptions(engines=("transformers",) * 3))
