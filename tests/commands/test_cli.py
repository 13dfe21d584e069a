"""The command line as a user meets it: output, exit codes, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CONFIG, gemma3_tensors, read_tensors, tree, write_checkpoint
from commands import run
from hubserver import HubServer

ROOT = Path(__file__).resolve().parents[2]


def test_the_whole_way_there_and_back(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=2)
    folded, back = tmp_path / "folded", tmp_path / "back"
    result = run("inspect", source)
    assert result.returncode == 0 and "verdict: foldable" in result.stdout
    result = run("convert", source, "-o", folded)
    assert result.returncode == 0 and "folded 19 norms" in result.stdout
    assert result.stderr == ""  # no progress bar where stderr is no terminal
    result = run("verify", folded, "--against", source)
    assert result.returncode == 0 and result.stdout.startswith("ok: ")
    assert run("unfold", folded, "-o", back).returncode == 0
    assert tree(back) == tree(source)


def test_json_output(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    found = json.loads(run("inspect", source, "--json").stdout)
    assert found["verdict"] == "foldable" and found["model_type"] == "gemma3_text"
    assert sum(group["count"] for group in found["groups"]) == 19
    assert all(group["evidence"]["how"] == "executed" for group in found["groups"])
    report = json.loads(run("convert", source, "-o", tmp_path / "out", "--json").stdout)
    assert report["tensors"] == 19 and sum(report["copied"].values()) > 0
    assert json.loads(run("verify", tmp_path / "out", "--json").stdout)["ok"] is True


def test_a_failed_check_exits_with_1(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    other = write_checkpoint(tmp_path / "other", gemma3_tensors(seed=1))
    run("convert", source, "-o", tmp_path / "out")
    result = run("verify", tmp_path / "out", "--against", other)
    assert result.returncode == 1 and "FAILED" in result.stdout


def test_an_unclassified_norm_is_shown_and_exits_with_3(tmp_path: Path) -> None:
    tensors = gemma3_tensors()
    tensors["model.layers.0.new_norm.weight"] = tensors["model.norm.weight"]
    source = write_checkpoint(tmp_path / "model", tensors)
    result = run("inspect", source)
    assert result.returncode == 3
    assert "UNCLASSIFIED" in result.stdout and "verdict: unsupported" in result.stdout


def test_a_missing_norm_is_named_and_exits_with_2(tmp_path: Path) -> None:
    tensors = gemma3_tensors()
    del tensors["model.norm.weight"]
    result = run("inspect", write_checkpoint(tmp_path / "model", tensors))
    assert result.returncode == 2
    assert "missing: model.norm.weight" in result.stdout
    assert "verdict: incomplete" in result.stdout


def test_traps_are_named(tmp_path: Path) -> None:
    norm = read_tensors(write_checkpoint(tmp_path / "gemma"))["model.norm.weight"]
    layer = "model.layers.0"
    names = ["model.norm", f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
    tensors = {f"{name}.weight": norm for name in [*names, f"{layer}.linear_attn.norm"]}
    config = CONFIG | {
        "model_type": "qwen3_next",
        "num_hidden_layers": 1,
        "layer_types": ["linear_attention"],
    }
    source = write_checkpoint(tmp_path / "qwen", tensors, config)
    (line,) = [x for x in run("inspect", source).stdout.splitlines() if "linear_attn.norm" in x]
    assert "plain: " in line
    assert run("convert", source, "-o", tmp_path / "out").returncode == 0
    folded = read_tensors(tmp_path / "out")
    assert folded[f"{layer}.linear_attn.norm.weight"].tobytes() == norm.tobytes()
    assert folded["model.norm.weight"].tobytes() != norm.tobytes()


@pytest.mark.parametrize("command", ["inspect", "convert", "verify", "unfold"])
def test_no_command_that_handles_bytes_imports_torch(command: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    run("convert", source, "-o", tmp_path / "folded")
    arguments = {
        "inspect": [source],
        "convert": [source, "-o", tmp_path / "out"],
        "verify": [tmp_path / "folded", "--against", source],
        "unfold": [tmp_path / "folded", "-o", tmp_path / "back"],
    }[command]
    script = (
        "import atexit, sys\n"
        "from gemma_fold.cli import main\n"
        "heavy = ('torch', 'transformers', 'huggingface_hub')\n"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules], file=sys.stderr))\n"
        "main()\n"
    )
    result = run(command, *arguments, command=("-c", script))
    assert result.returncode == 0
    assert result.stderr.strip() == "[]"


def test_importing_the_package_is_light() -> None:
    script = "import sys, gemma_fold; print([m for m in ('numpy', 'torch') if m in sys.modules])"
    assert run(command=("-c", script)).stdout.strip() == "[]"


def test_help_shows_examples_for_every_command() -> None:
    listing = run("--help").stdout
    for command in ("inspect", "convert", "verify", "unfold", "diff", "serve"):
        assert command in listing
        assert "Example" in run(command, "--help").stdout


def test_runs_from_a_checkout_without_installing(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    result = run("inspect", source, command=(str(ROOT / "cli.py"),), cwd=tmp_path)
    assert result.returncode == 0


def test_output_cut_off_by_head_is_no_error(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    command = f"{sys.executable} -m gemma_fold inspect {source} --json | head -n 1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "{" and result.stderr == ""


@pytest.mark.slow
def test_a_hub_id_is_inspected_without_its_weights_then_converted(tmp_path: Path) -> None:
    tensors = gemma3_tensors()
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((4096, 1024), np.float16)
    source = write_checkpoint(tmp_path / "model", tensors, shards=2)
    with HubServer() as hub:
        commit = hub.add("org/tiny", source)
        environment = hub.environment(tmp_path)
        found = json.loads(run("inspect", "org/tiny@main", "--json", env=environment).stdout)
        assert (found["verdict"], found["commit"]) == ("foldable", commit)
        payload = sum(tensor.nbytes for tensor in tensors.values())
        assert found["bytes"] == payload > 20 * sum(hub.sent.values())

        result = run("convert", f"org/tiny@{commit}", "-o", tmp_path / "out", env=environment)
        assert result.returncode == 0, result.stderr
        manifest = json.loads((tmp_path / "out/gemma_fold.json").read_text())
        assert manifest["source"] == {"name": "org/tiny", "repo_id": "org/tiny", "commit": commit}
        assert run("verify", tmp_path / "out", "--against", source).returncode == 0
        assert run("unfold", tmp_path / "out", "-o", tmp_path / "back").returncode == 0
        assert tree(tmp_path / "back") == tree(source)

        result = run("inspect", "org/absent", env=environment)
        assert result.returncode == 2 and result.stderr.count("\n") == 1


class TestCheck:
    """`check` as a user meets it."""

    def test_exit_codes(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model")
        tensors = gemma3_tensors()
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
        wrong = write_checkpoint(tmp_path / "wrong", tensors)
        unknown = write_checkpoint(tmp_path / "unknown", config={"model_type": "who"})
        (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(20))
        for arguments, code, words in (
            ([source, "--against", source], 0, "right: 19 norms"),
            ([wrong, "--against", source], 1, "wrong: of 19 norms, 1 "),
            ([source], 2, "cannot tell"),
            ([tmp_path / "bad.gguf"], 2, "version 0"),
            ([tmp_path / "nothing"], 2, "does not exist"),
            ([], 2, "give a file to check"),
            ([unknown], 3, "who"),
        ):
            result = run("check", *arguments)
            assert result.returncode == code, result
            assert words in result.stdout + result.stderr
            assert "Traceback" not in result.stderr and result.stderr.count("\n") <= 1

    def test_json_and_all(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model")
        found = json.loads(run("check", source, "--against", source, "--json").stdout)
        assert found["right"] is True and len(found["norms"]) == 19
        assert {norm["finding"] for norm in found["norms"]} == {"same"}
        assert found["file"]["read"] < found["file"]["size"]
        listed = run("check", source, "--against", source, "--all").stdout
        assert "layers.2.self_attn.k_norm.weight: same" in listed

    def test_a_norm_on_standard_input(self, tmp_path: Path) -> None:
        source = write_checkpoint(tmp_path / "model")
        w = gemma3_tensors()["model.norm.weight"].astype(np.float32)
        np.save(tmp_path / "gain.npy", w + np.float32(1))
        with open(tmp_path / "gain.npy") as stream:
            result = run("check", "--against", source, "--tensor", "output_norm=-", stdin=stream)
        assert result.returncode == 0, result.stderr
        assert "right: 1 norm holds gamma" in result.stdout
