"""What the rules decide is tested here on name lists that were measured, or read, without them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_fold.errors import NothingToFoldError
from gemma_fold.rules import CLASSES, NORM_CLASSES, TABLE, Evidence, Fold, Kind, Verdict, classify
from gemma_fold.rules.row import Family, Norm, Plain, expand

DATA = Path(__file__).parents[1] / "data"
MEASURED: dict[str, Any] = json.loads((DATA / "norms.json").read_text())
READ: dict[str, Any] = json.loads((DATA / "norms_read.json").read_text())
CLASS_FACTS = MEASURED.pop("_about")["classes"]
READ.pop("_about")


def kind_alone(config: dict[str, Any], name: str) -> Kind:
    """The kind of the only tensor of a checkpoint: nothing but its name can tell."""
    return classify(config, {name: (8,)}).rules[name].kind


@pytest.mark.parametrize("model_type", MEASURED)
def test_kind_of_every_measured_tensor(model_type: str) -> None:
    config: dict[str, Any] = {"model_type": model_type}
    if model_type == "paligemma":  # the one measured had a Gemma 2 inside
        config["text_config"] = {"model_type": "gemma2"}
    want = {
        "zero_centred": Kind.ZERO_CENTRED,
        "plain": Kind.PLAIN,
        "input_scaled": Kind.NOT_A_GAMMA,
    }
    facts = MEASURED[model_type]
    wrong = [
        (name, kind)
        for label, expected in want.items()
        for name in facts.get(label, ())
        # a scale, not a norm: what is no norm is left alone just the same
        if not name.endswith("altup.correct_output_scale")
        if (kind := kind_alone(config, name.replace("{i}", "0"))) is not expected
    ]
    assert wrong == []


@pytest.mark.parametrize("model_type", [m for m, v in MEASURED.items() if not v["zero_centred"]])
def test_families_measured_as_plain_have_nothing_to_fold(model_type: str) -> None:
    shapes = {name.replace("{i}", "0"): (8,) for name in MEASURED[model_type]["plain"]}
    found = classify({"model_type": model_type}, shapes)
    assert found.verdict is Verdict.NOTHING_TO_FOLD
    with pytest.raises(NothingToFoldError, match="nothing to fold") as error:
        found.require_foldable()
    assert error.value.exit_code == 3


@pytest.mark.parametrize("family", READ)
def test_offset_of_every_tensor_read_in_an_engine(family: str) -> None:
    facts = READ[family]
    for prefix in facts["prefixes"]:
        names = {prefix + n.replace("{i}", "0"): offset for n, offset in facts["offsets"].items()}
        groups = [list(names)] if facts.get("together") else [[name] for name in names]
        for group in groups:
            found = classify(facts["config"], dict.fromkeys(group, (8,)))
            for name in group:
                rule = found.rules[name]
                offset = names[name]
                assert rule.kind is (Kind.ZERO_CENTRED if offset else Kind.PLAIN), name
                assert (rule.fold.offset if rule.fold else 0) == offset, name


def test_classes_are_those_measured() -> None:
    rounding = {
        "fp32 add, fp32 mul, cast": ("float32", "float32"),
        "bf16 add, fp32 mul, cast": ("storage", "float32"),
        "bf16 add, bf16 mul": ("storage", "storage"),
    }
    gains = {name: fact for name, fact in CLASS_FACTS.items() if fact["verdict"] == "zero_centred"}
    assert set(NORM_CLASSES) == set(gains)
    for name, fact in gains.items():
        add, mul = rounding[fact["arithmetic_in_bf16"]]
        norm = "layer_norm" if fact["kind"] == "layernorm" else "rms_norm"
        assert NORM_CLASSES[name] == Fold(norm, 1.0, add, mul), name
    others = {row.name: row.kind for row in CLASSES if row.fold is None}
    assert others == {"MuseSparkTextInputScaledRMSNorm": Kind.NOT_A_GAMMA}
    assert all(f"{CLASS_FACTS[c.name]['file']}:" in c.evidence.source for c in CLASSES)


# --- the table itself ----------------------------------------------------------------------------


def test_a_row_without_evidence_cannot_be_written() -> None:
    with pytest.raises(TypeError, match="evidence"):
        Family(model_types=("x",), norms=(Norm("norm.weight"),))  # type: ignore[call-arg]
    for how, source in (("executed", " "), ("guessed", "somewhere")):
        with pytest.raises(ValueError, match="evidence"):
            Evidence(how, source)  # type: ignore[arg-type]


def test_every_row_says_where_its_evidence_is() -> None:
    for row in TABLE:
        proofs = [row.evidence, *(norm.evidence for norm in row.norms if norm.evidence)]
        for evidence in proofs:
            assert re.search(r"\d\.\d+", evidence.source), (row.model_types, evidence)


def test_every_pattern_is_a_whole_name() -> None:
    lines: list[Norm | Plain] = [line for row in TABLE for line in (*row.norms, *row.plain)]
    for line in lines:
        for name in expand(line.names):
            assert re.fullmatch(r"(?:[A-Za-z0-9_]+|\{i\})(?:\.(?:[A-Za-z0-9_]+|\{i\}|\*\*))*", name)
            if isinstance(line, Norm):
                assert "*" not in name


def test_no_model_type_is_both_plain_and_zero_centred() -> None:
    plain = [t for row in TABLE if row.all_plain for t in row.model_types]
    others = {t for row in TABLE if not row.all_plain for t in row.model_types}
    assert len(plain) == len(set(plain))
    assert not others & set(plain)


def test_every_part_and_architecture_leads_to_a_row() -> None:
    known = {t for row in TABLE for t in row.model_types}
    for row in TABLE:
        assert row.model_types or row.architectures
        for part in row.parts:
            assert (part.model_type or part.default) in known, row.model_types


def test_rules_need_nothing_but_python() -> None:
    code = (
        "import sys, gemma_fold.rules;"
        "print(*({'numpy', 'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert loaded.stdout.strip() == ""


def test_expand() -> None:
    assert expand("a.{b,c}.{i}.{,d.}w") == ("a.b.{i}.w", "a.b.{i}.d.w", "a.c.{i}.w", "a.c.{i}.d.w")
    assert expand("{x,l.{i}.n{1,2}}.w") == ("x.w", "l.{i}.n1.w", "l.{i}.n2.w")
