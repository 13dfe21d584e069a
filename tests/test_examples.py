"""The programs of `examples`, run as their headers say; `make demo` runs demo.sh."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import norm_files
import pytest
import tiny
import torch
from commands import run

from gemma_fold.commands.convert import convert

FOLDER = Path(__file__).resolve().parent.parent / "examples"
PROGRAMS = [path for path in FOLDER.iterdir() if path.name not in ("README.md", "__pycache__")]
LONGEST = 80
#: Not to copy from: it builds the model that others run on.
BUILDER = "make_gemma3_270m.py"


def example(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run(*arguments, command=(str(FOLDER / name),))


def test_every_one_is_listed() -> None:
    listed = (FOLDER / "README.md").read_text()
    for path in PROGRAMS:
        assert path.name in listed, f"{path.name} is not in examples/README.md"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_they_are_short_and_say_how_they_are_run(path: Path) -> None:
    text = path.read_text()
    if path.name != BUILDER:
        assert len(text.splitlines()) < LONGEST
        assert f"python examples/{path.name}" in text


def test_a_gguf_file_is_checked(tmp_path: Path) -> None:
    original = tiny.save("gemma3_text", tmp_path / "original", torch.bfloat16)
    right = norm_files.write_gguf(original, tmp_path / "right.gguf")
    done = example("check_gguf.py", right, original)
    assert done.returncode == 0, done.stderr
    count = len(norm_files.norms_of(original))
    assert done.stdout.startswith(f"{count:4} norms: ")

    twice = norm_files.write_gguf(original, tmp_path / "twice.gguf", norm_files.added(1))
    done = example("check_gguf.py", twice, original)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{count:4} norms: offset added twice\n")
    assert done.stdout.count("\n") == count + 2


def test_a_family_is_added() -> None:
    done = example("add_family.py")
    assert done.returncode == 0, done.stderr
    refused, zero_centred, plain, folded, verified = done.stdout.splitlines()
    assert "no rule says" in refused
    assert zero_centred.endswith(": zero_centred") and plain.endswith(": plain")
    assert "5 norms folded, 320 weights" in folded and verified.endswith("True")


@pytest.mark.slow
def test_a_folded_checkpoint_goes_on_as_the_original_does(real_270m: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "The capital of France is"
    done = example("convert_and_chat.py", real_270m, tmp_path / "folded", prompt)
    assert done.returncode == 0, done.stderr
    assert "folded 109 norms, 55,936 weights" in done.stderr

    stock, tokenizer = (
        kind.from_pretrained(real_270m) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    ids = tokenizer(prompt, return_tensors="pt")
    want = stock.generate(**ids, max_new_tokens=20, do_sample=False)
    assert done.stdout == tokenizer.decode(want[0], skip_special_tokens=True) + "\n"


@pytest.mark.slow
def test_a_model_is_folded_in_memory(tmp_path: Path) -> None:
    from tokenizers_made import tiny_tokenizer

    folder = tiny.save("gemma3_text", tmp_path / "model", torch.bfloat16)
    tiny_tokenizer().save_pretrained(folder)
    done = example("fold_in_memory.py", folder)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(identical|different)$", done.stdout, re.MULTILINE) == ["identical"] * 2


@pytest.mark.slow
def test_a_model_of_ones_own() -> None:
    done = example("own_model.py")
    assert done.returncode == 0, done.stderr
    place = re.match(r"on (cpu|cuda): ", done.stdout)
    assert place is not None
    if place[1] == "cpu":
        assert "the same bits" in done.stdout
    assert done.stdout.endswith("gradient of gamma: torch.float32, (256,)\n")


@pytest.mark.slow
def test_two_servers_are_compared(tmp_path: Path) -> None:
    from logprob_server import LogprobServer
    from tokenizers_made import tiny_tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import gemma_fold

    folder = tiny.save("gemma3_text", tmp_path / "stock", torch.bfloat16)
    tiny_tokenizer().save_pretrained(folder)
    convert(folder, tmp_path / "folded")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    models = [
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        gemma_fold.load(tmp_path / "folded").eval(),
        tiny.build("gemma3_text", torch.bfloat16, seed=1),
    ]
    with (
        LogprobServer(models[0], tokenizer) as stock,
        LogprobServer(models[1], tokenizer) as folded,
        LogprobServer(models[2], tokenizer) as other,
    ):
        same = example("compare_servers.py", stock.url, folded.url)
        assert same.returncode == 0, same.stderr
        assert "mean KL divergence: 0 nats" in same.stdout
        assert example("compare_servers.py", stock.url, other.url).returncode == 1
