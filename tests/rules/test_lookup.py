"""`lookup` and the export: what programs outside are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gemma_fold
from gemma_fold.rules import CLASSES, TABLE, Fold, lookup
from gemma_fold.rules.export import export, plain_values, schema
from gemma_fold.rules.row import expand

READ: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "norms_read.json").read_text()
)
PACKAGE = Path(str(gemma_fold.__file__)).parent / "rules"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("model_type", "name", "kind"),
    [
        ("gemma3_text", "model.layers.0.self_attn.q_norm.weight", "zero_centred"),
        ("gemma3_text", "model.layers.{i}.self_attn.q_norm.weight", "zero_centred"),
        ("gemma3", "model.language_model.layers.3.input_layernorm.weight", "zero_centred"),
        ("gemma3", "model.vision_tower.vision_model.post_layernorm.weight", "plain"),
        ("nemotron", "model.norm.weight", "layernorm1p"),
        ("moonshine_streaming", "model.encoder.final_norm.gamma", "layernorm1p"),
        ("qwen3_5", "model.language_model.layers.0.linear_attn.norm.weight", "plain"),
        ("qwen3_5", "mtp.norm.weight", "zero_centred"),
        ("llama", NORM, "plain"),
        ("gemma4_text", NORM, "plain"),
        ("muse_spark_text", "model.layers.3.post_feedforward_layernorm.weight", "input_scaled"),
        ("gemma3_text", "model.embed_tokens.weight", "not_a_norm"),
        ("nemotron", "model.norm.bias", "not_a_norm"),
        ("gemma3_text", "model.layers.0.extra_norm.weight", "unknown"),
        ("brand_new", NORM, "unknown"),
        ("pi05", NORM, "unknown"),
        ("gemma_fold", NORM, "unknown"),
        ("llava", "language_model.model.norm.weight", "unknown"),
        ("llava", "model.layers.0.input_layernorm.weight", "unknown"),
        ("llava", "model.norm.weight", "unknown"),
        ("llava", "multi_modal_projector.linear_1.weight", "not_a_norm"),
        ("rag", "generator.model.norm.weight", "unknown"),
        ("encoder-decoder", "decoder.model.norm.weight", "unknown"),
        ("internvl_chat", "language_model.model.norm.weight", "unknown"),
        ("qwen2_vl", "model.language_model.norm.weight", "plain"),
    ],
)
def test_lookup(model_type: str, name: str, kind: str) -> None:
    rule = lookup(model_type, name)
    assert rule.kind == kind
    assert (rule.fold is not None) is (kind in ("zero_centred", "layernorm1p"))
    assert (rule.evidence is None) is (kind in ("not_a_norm", "unknown"))
    assert bool(rule.note) or kind != "unknown"


def test_lookup_says_how_to_add() -> None:
    assert lookup("plamo3", "model.layers.layers.0.post_mixer_norm.weight").fold == Fold(
        "rms_norm", 1 / 5, "storage", "storage"
    )


def test_a_model_inside_a_wrapper_is_decided_by_the_config() -> None:
    name = "language_model.model.layers.0.input_layernorm.weight"
    for inside, kind in (("gemma2", "zero_centred"), ("llama", "plain"), ("new", "unknown")):
        config = {"model_type": "llava", "text_config": {"model_type": inside}}
        assert lookup("llava", name, config).kind == kind
    config = {"model_type": "llava", "text_config": {"model_type": "gemma2"}}
    assert lookup("llava", "multi_modal_projector.norm.weight", config).kind == "plain"


@pytest.mark.parametrize("name", ["", "{", "{a,b}", "\0", "norm\n", "norm" * 100_000, "../norm"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "llama", "llava", "", "{a,b}", "\0"])
def test_no_name_is_too_strange(model_type: str, name: str) -> None:
    assert lookup(model_type, name).fold is None


def test_a_config_that_is_no_config_is_unknown() -> None:
    nested: dict[str, Any] = {}
    for _ in range(1000):
        nested = {"model_type": "llava", "text_config": nested}
    for config in (nested, {"num_hidden_layers": "two"}, {"gemma_fold": {}}):
        assert lookup(config.get("model_type", "gemma3_text"), NORM, config).kind == "unknown"


def test_a_condition_says_what_the_config_decides() -> None:
    silent = lookup("minimax_m3_vl_text", NORM)
    assert (silent.kind, silent.condition) == ("zero_centred", "use_gemma_norm is true (or absent)")
    off = lookup("minimax_m3_vl_text", NORM, {"use_gemma_norm": False})
    assert (off.kind, off.condition) == ("plain", silent.condition)
    assert lookup("minimax_m3_vl_text", NORM, {"use_gemma_norm": "yes"}).kind == "unknown"
    gated = lookup("gigachat3_5", "model.layers.0.linear_attn.norm.weight")
    assert gated.kind == "plain"
    assert gated.condition.endswith("and linear_gating_type contains zero_centered")
    assert lookup("gemma", NORM).condition == ""


# Where names have to be seen together, one alone does not tell the layout.
ALONE = [name for name, facts in READ.items() if name != "_about" and not facts.get("together")]


@pytest.mark.parametrize("family", ALONE)
def test_lookup_agrees_with_what_was_read(family: str) -> None:
    facts = READ[family]
    for name, offset in facts["offsets"].items():
        full = facts["prefixes"][0] + name
        rule = lookup(facts["config"].get("model_type", ""), full, facts["config"])
        assert (rule.fold.offset if rule.fold else 0) == offset, name


# --- the export ----------------------------------------------------------------------------------


def test_the_export_has_every_row_and_every_name() -> None:
    found = export()
    for row, family in zip(TABLE, found.families, strict=True):
        assert family.model_types == row.model_types
        names = [name for norm in family.norms for name in norm.names]
        assert names == [n for line in (*row.norms, *row.plain) for n in expand(line.names)]
        assert (family.kind == "refused") is bool(row.refuse)
        assert (family.kind == "plain") is row.all_plain
    assert {"llava", "mistral3", "rag", "ultravox"} <= set(found.wrappers)
    assert [each.name for each in found.classes] == [each.name for each in CLASSES]


def test_packaged_files_are_up_to_date() -> None:
    assert json.loads((PACKAGE / "rules.json").read_text()) == plain_values(export()), "make docs"
    assert json.loads((PACKAGE / "rules.schema.json").read_text()) == schema(), "make docs"


TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}


def wrong(value: Any, rule: dict[str, Any], defs: dict[str, Any], where: str = "") -> list[str]:
    """Where `value` breaks a JSON Schema of the few words that ours uses."""
    if "$ref" in rule:
        return wrong(value, defs[rule["$ref"].removeprefix("#/$defs/")], defs, where)
    if "anyOf" in rule:
        return min((wrong(value, each, defs, where) for each in rule["anyOf"]), key=len)
    if "enum" in rule:
        return [] if value in rule["enum"] else [where]
    if rule["type"] == "array":
        if not isinstance(value, list):
            return [where]
        listed = [wrong(v, rule["items"], defs, f"{where}[{i}]") for i, v in enumerate(value)]
        return [each for found in listed for each in found]
    if rule["type"] == "object":
        if not isinstance(value, dict) or set(value) != set(rule["required"]):
            return [where]
        assert set(rule["required"]) == set(rule["properties"])
        assert rule["additionalProperties"] is False
        listed = [wrong(value[k], r, defs, f"{where}.{k}") for k, r in rule["properties"].items()]
        return [each for found in listed for each in found]
    fits = isinstance(value, TYPES[rule["type"]])
    return [] if fits and (rule["type"] == "boolean" or not isinstance(value, bool)) else [where]


def test_the_export_follows_its_schema() -> None:
    told = json.loads((PACKAGE / "rules.json").read_text())
    rule = json.loads((PACKAGE / "rules.schema.json").read_text())
    assert wrong(told, rule, rule["$defs"]) == []
    told["families"][0]["kind"] = "perhaps"
    told["families"][1]["norms"][0]["fold"] = {"offset": "1"}
    del told["classes"][0]["name"]
    assert wrong(told, rule, rule["$defs"]) == [
        ".families[0].kind",
        ".families[1].norms[0].fold",
        ".classes[0]",
    ]


# --- the command ---------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gemma_fold", "rules", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_prints_one_family() -> None:
    done = run("plamo3")
    assert done.returncode == 0
    assert "layers.layers.{i}.post_mixer_norm.weight" in done.stdout
    assert "RMSNorm gain 0.2 + w" in done.stdout
    assert "vLLM 0.32 models/plamo3.py" in done.stdout


def test_the_command_says_where_a_wrapper_is_decided() -> None:
    assert "its own model_type" in run("llava").stdout
    assert "its own model_type" not in run("llama").stdout
    assert json.loads(run("llava", "--json").stdout)["wrappers"] == ["llava"]


def test_the_command_prints_all() -> None:
    lines = run().stdout.splitlines()
    assert lines[0].split() == ["MODEL", "TYPES", "NORMS", "ZERO-CENTRED", "IF", "EVIDENCE"]
    zero_centred = [row for row in TABLE if not row.all_plain]
    assert len(lines) == 1 + len(zero_centred) + 2


def test_the_command_prints_json() -> None:
    assert json.loads(run("--json").stdout) == plain_values(export())
    one = json.loads(run("gemma2", "--json").stdout)
    assert [family["model_types"] for family in one["families"]] == [["gemma2"]]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gema3", "did you mean gemma3"),
        ("Gemma3", "did you mean"),
        ("zzzzz\nz", "lists them all"),
        ("gemma_fold", "base_config"),
        ("z" * 10_000, "z...'; gemma-fold rules lists them all"),
    ],
)
def test_an_unknown_model_type_is_one_line(name: str, hint: str) -> None:
    done = run(name)
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert len(done.stderr) < 200
    assert hint in done.stderr
