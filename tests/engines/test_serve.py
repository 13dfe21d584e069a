"""`transformers serve`, started by gemma-fold, says over HTTP what it says for the original."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import tiny
import torch
from commands import run
from local_server import free_port
from model_server import OURS, PLAIN, server
from tokenizers_made import tiny_tokenizer

from gemma_fold.commands.convert import convert
from gemma_fold.engines.serve import serve
from gemma_fold.errors import CheckpointError, HostError, UsageError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny.save("gemma3_text", tmp_path / "source", torch.bfloat16)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folded(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "folded")
    return tmp_path / "folded"


@pytest.mark.slow
def test_the_same_greedy_text_as_the_original(source: Path, folded: Path, tmp_path: Path) -> None:
    texts = []
    for program, folder in ((PLAIN, source), (OURS, folded)):
        with server(program, folder, tmp_path / "log") as client:
            answers = [
                client.chat.completions.create(
                    model=str(folder),
                    messages=[{"role": "user", "content": prompt}],
                    temperature=0,
                    max_tokens=12,
                )
                for prompt in ("w5 w7 w11 w13", "w80 w4")
            ]
        texts.append([answer.choices[0].message.content for answer in answers])
    assert texts[0] == texts[1]
    assert all(texts[0])


@pytest.mark.slow
def test_a_user_without_a_hub_cache_is_served(
    folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    with server(OURS, folded, tmp_path / "log") as client:
        assert client.models.list().data == []  # what that server lists is the cache
        answer = client.chat.completions.create(
            model=str(folded), messages=[{"role": "user", "content": "w5 w7"}], max_tokens=2
        )
        assert answer.choices[0].message.content


def test_other_engines_say_that_they_cannot(folded: Path) -> None:
    with pytest.raises(HostError, match="SGLang is not installed; install it"):
        serve(folded, "sglang", port=free_port())
    with pytest.raises(HostError, match=r"vLLM is not installed; .* pip install vllm"):
        serve(folded, "vllm", port=free_port())
    with pytest.raises(UsageError, match="unknown engine ollama"):
        serve(folded, "ollama")


def test_only_folded_checkpoints_are_served(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folded checkpoint"):
        serve(source)
    with pytest.raises(CheckpointError, match="does not exist"):
        serve(tmp_path / "nowhere")


def test_a_port_in_use_is_noticed_first(folded: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve(folded, port=port)


def test_wrong_engine_arguments_are_the_engines_to_judge(folded: Path) -> None:
    with pytest.raises(UsageError, match=r"transformers serve: .*no-such-option"):
        serve(folded, port=free_port(), engine_args=["--no-such-option"])


@pytest.mark.slow
def test_what_is_served_is_said_once_all_is_checked(folded: Path) -> None:
    port = free_port()
    arguments = ("--port", str(port), "--json", "--", "--no-such-argument")
    done = run("serve", folded, *arguments)
    assert done.returncode == 2 and "No such option" in done.stderr
    url = f"http://127.0.0.1:{port}/v1"
    expected = {"checkpoint": str(folded), "engine": "transformers", "url": url}
    assert json.loads(done.stdout) == expected
    assert run("serve", folded, "--port", "70000").stdout == ""
    assert run("serve", folded.parent, "--json").stdout == ""
