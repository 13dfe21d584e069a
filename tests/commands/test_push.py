"""`push` with the real client, against a stand-in for the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import tree, write_checkpoint
from commands import run
from hubserver import HubServer

from gemma_fold.commands.convert import convert
from gemma_fold.commands.push import push
from gemma_fold.commands.unfold import unfold
from gemma_fold.errors import CheckpointError

TOKEN = "hf_writer"
HEAD = """---
license: gemma
license_link: https://example.org/terms
extra_gated_prompt: You agree to the terms.
library_name: transformers
tags: [theirs]
---
# The model
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        (tmp_path / "uploads").mkdir()
        server.allow_uploads(tmp_path / "uploads", TOKEN)
        yield server


@pytest.fixture
def environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    ours = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return os.environ | hub.environment(tmp_path / "home") | ours


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "model", shards=2)
    (folder / "README.md").write_text(HEAD)
    (folder / "LICENSE.txt").write_text("Terms of use")
    return folder


@pytest.fixture
def folded(hub: HubServer, source: Path, tmp_path: Path, environment: dict[str, str]) -> Path:
    hub.add("org/tiny", source)
    done = run("convert", "org/tiny", "-o", tmp_path / "folded", env=environment)
    assert done.returncode == 0, done.stderr
    return tmp_path / "folded"


def head_of(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_a_new_repository_holds_the_checkpoint_and_a_card(
    hub: HubServer, folded: Path, source: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    before = tree(folded)
    done = run("push", folded, "me/tiny-folded", "--private", "--json", env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    report = json.loads(done.stdout)
    model = hub.models["me/tiny-folded"]
    assert model.private and report["commit"] == model.commit
    assert report["url"].endswith(f"me/tiny-folded/commit/{model.commit}")
    assert tree(folded) == before, "the folder here stays as it is"

    card = (model.folder / "README.md").read_text()
    head = head_of(card)
    assert head["base_model"] == "org/tiny" and head["base_model_relation"] == "quantized"
    assert (head["license"], head["license_link"]) == ("gemma", "https://example.org/terms")
    assert head["extra_gated_prompt"] == "You agree to the terms."
    assert head["tags"] == ["gemma-fold", "gemma3_text"]
    commit = hub.models["org/tiny"].commit
    assert f"gemma-fold convert org/tiny@{commit} -o" in card
    assert 'gemma_fold.load("me/tiny-folded")' in card and "`LICENSE.txt`" in card
    assert "| norms folded | 19, as float32 of shape [H, 1] |" in card
    assert "| weights in them | 360 |" in card
    assert (model.folder / "README.source.md").read_text() == HEAD

    # What was pushed is a folded checkpoint: from the Hub it verifies, and gives the source back.
    for arguments in (
        ["verify", model.folder],
        ["verify", model.folder, "--against", source],
        ["unfold", model.folder, "-o", tmp_path / "again"],
    ):
        done = run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    assert tree(tmp_path / "again") == tree(source)


def test_the_numbers_of_the_card_are_those_of_inspect(
    folded: Path, source: Path, environment: dict[str, str]
) -> None:
    found = json.loads(run("inspect", source, "--json").stdout)
    done = run("push", folded, "me/new", "--dry-run", env=environment)
    changed = found["bf16_gamma_changes"]
    assert changed > 0 and f"a bf16 gamma would change {changed:,} |" in done.stdout
    norms = sum(g["count"] for g in found["groups"] if g["kind"] == "zero-centred")
    assert norms == 19 and f"| all other tensors | {found['tensors'] - norms}, " in done.stdout


def test_a_dry_run_sends_nothing(hub: HubServer, folded: Path, environment: dict[str, str]) -> None:
    requests = len(hub.log)
    done = run("push", folded, "me/new", "--dry-run", env=environment)
    assert done.returncode == 0 and "would push" in done.stdout and "base_model:" in done.stdout
    assert len(hub.log) == requests and "me/new" not in hub.models


def test_a_pull_request_leaves_the_main_branch(
    hub: HubServer, folded: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    other = write_checkpoint(tmp_path / "other")
    hub.add("org/other", other)
    before = tree(other)
    refused = run("push", folded, "org/other", env=environment)
    assert refused.returncode == 2 and "holds another model" in refused.stderr
    done = run("push", folded, "org/other", "--create-pr", "--json", env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["pull_request"] == "refs/pr/1" and report["url"].endswith("/discussions/1")
    assert tree(other) == before
    (proposed,) = hub.pull_requests
    assert run("verify", proposed.folder).returncode == 0


@pytest.mark.slow
def test_it_can_be_pushed_again_and_after_a_fetch(
    hub: HubServer, folded: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    assert run("push", folded, "me/one", env=environment).returncode == 0
    sent = len(hub.stored)
    assert run("push", folded, "me/one", env=environment).returncode == 0
    assert len(hub.stored) == sent
    fetched = hub.models["me/one"].folder
    done = run("push", fetched, "me/two", env=environment)
    assert done.returncode == 0, done.stderr
    two = hub.models["me/two"].folder
    one_files, two_files = tree(fetched), tree(two)
    assert one_files.pop("README.md") != two_files.pop("README.md")  # by their names
    assert one_files == two_files


@pytest.mark.slow
def test_what_is_refused(
    hub: HubServer, folded: Path, source: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    def refused(*arguments: str | Path, env: dict[str, str] = environment) -> str:
        done = run("push", *arguments, env=env)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "is not a folded checkpoint" in refused(source, "me/new")
    assert "is the original's own repository" in refused(folded, "org/tiny", "--create-pr")
    assert "names a revision" in refused(folded, "me/new@main")
    assert "is not a Hub id" in refused(folded, "new")
    nobody = {name: value for name, value in environment.items() if name != "HF_TOKEN"}
    assert "needs a token that may write" in refused(folded, "me/new", env=nobody)
    reader = environment | {"HF_TOKEN": "hf_reader"}
    assert "me/new" in refused(folded, "me/new", env=reader)
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE" in refused(folded, "me/new", env=offline)
    assert "me/new" not in hub.models
    damaged = folded / "model-00001-of-00002.safetensors"
    with open(damaged, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert "is not as it was written" in refused(folded, "me/new")
    assert "me/new" not in hub.models


def test_only_what_a_push_put_aside_is_a_card(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "local")
    (source / "README.source.md").write_text("theirs")
    convert(source, tmp_path / "out")
    unfold(tmp_path / "out", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(source)
    with pytest.raises(CheckpointError, match="rename it in the source"):
        push(tmp_path / "out", "me/new", dry_run=True)


def test_a_source_that_is_not_on_the_hub(tmp_path: Path, environment: dict[str, str]) -> None:
    source = write_checkpoint(tmp_path / "local")
    run("convert", source, "-o", tmp_path / "out")
    done = run("push", tmp_path / "out", "me/new", "--dry-run", env=environment)
    assert "base_model" not in done.stdout.split("---\n")[1]
    assert "--base-model" in done.stderr and "licence" in done.stderr
    named = ("--dry-run", "--base-model", "org/tiny")
    done = run("push", tmp_path / "out", "me/new", *named, env=environment)
    assert head_of(done.stdout)["base_model"] == "org/tiny"


@pytest.mark.parametrize(
    "head",
    [
        "---\nlicense: [\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
        "---\n" + "a: " + "[" * 3000 + "\n---\n",
    ],
    ids=["unfinished", "python", "nested"],
)
def test_a_card_that_cannot_be_read_is_said(head: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "local")
    (source / "README.md").write_text(head)
    run("convert", source, "-o", tmp_path / "out")
    done = run("push", tmp_path / "out", "me/new", "--dry-run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot be read, and with it the licence" in done.stderr
