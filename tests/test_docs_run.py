"""What the documents show is run as it stands there: shell lines by bash, Python by Python.

A small Gemma 3 stands for every model that a line names, on a Hub of this machine and as a folder.
What cannot run here, such as a server of vLLM, is in ELSEWHERE with the test that runs it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import norm_files
import numpy as np
import patience
import pytest
import tiny
import torch
from hubserver import HubServer
from tokenizers_made import tiny_tokenizer

from gemma_fold.commands.convert import convert

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("examples/**/*.md")]
GENERATED = re.compile(r"<!-- generated: .*?<!-- end -->", re.DOTALL)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    (\S.*)$", re.MULTILINE)
#: Where the site shows docstrings.
DOCSTRINGS = re.compile(r"^::: \S+\n(    .*\n)*", re.MULTILINE)
#: How a piece of a file begins, which is not run; `test_docs_commands.py` looks for it there.
PIECE = "# gemma_fold/"
#: Formulas of numerics.md stand there as code does.
FORMULA = re.compile(r"y\d? = ")
COMMENT = re.compile(r"\s+#\s.*$")
#: Lines that nothing here can run, and what does run them.
ELSEWHERE = {
    r".*python examples/task_accuracy/": "tests/test_task_accuracy.py",
    r"make (demo|docs|kernels|rl-sync|test)": "Makefile",
    r"pip install ": "tools/package.py",
    r"\.venv/bin/pytest ": "Makefile",
    r"(GEMMA_FOLD=\w+ )?vllm serve ": "tests/engines/test_vllm.py",
    r".*--engine vllm": "tests/engines/test_vllm.py",
    r"(GEMMA_FOLD=\w+ )?python -m sglang\.launch_server ": "tests/engines/test_sglang.py",
    r".*--engine sglang": "tests/engines/test_sglang_diff.py",
    r"gemma-fold serve ": "tests/engines/test_serve.py",
    r"gemma-fold doctor": "tests/engines/test_doctor.py",
    r"gemma-fold diff .*--html": "tests/compare/test_diff.py",
    r"gemma-fold diff .*http:": "tests/compare/test_diff_evidence.py",
    r"hf (extensions|gemma-fold) ": "tests/test_hf_extension.py",
    # Nobody runs an upload; this makes what is uploaded.
    r"(kernel-builder|hf repos|hf upload) ": "tools/kernel_package.py",
}
#: Documents whose Python needs a GPU or several processes, and what runs it.
PYTHON_ELSEWHERE = {
    "determinism.md": "tests/engines/fsdp_worker.py",
    "kernels_hub.md": "tests/test_kernels_library.py",
}
#: What the Python of a document takes for granted.
PRELUDES = {
    "all_reduce.md": """
import torch
group, x, residual = None, torch.ones(2, 5376).bfloat16(), torch.ones(2, 5376).bfloat16()
gamma = pre_gamma = post_gamma = torch.ones(5376)
""",
    "check.md": "import numpy\nnorm_gain = numpy.ones(32, numpy.float32)\n",
    "transformers.md": """
from transformers import AutoModelForCausalLM
folder = "gemma-3-270m-folded"
""",
}
TOKEN = "hf_writer"


@dataclass(frozen=True)
class Line:
    """A line of shell, or the Python of a document."""

    document: str
    text: str

    @property
    def elsewhere(self) -> str | None:
        return next((by for line, by in ELSEWHERE.items() if re.match(line, self.text)), None)

    def param(self) -> Any:
        quick = self.document == "README.md" and not self.text.startswith("gemma-fold diff")
        marks = () if quick else pytest.mark.slow
        return pytest.param(self, marks=marks, id=f"{self.document}: {self.text[:60]}")


def shell_lines() -> Iterator[Line]:
    for path in DOCUMENTS:
        text = DOCSTRINGS.sub("", GENERATED.sub("", path.read_text()))
        fenced = [body for language, body in FENCE.findall(text) if language == ""]
        lines = [line for body in fenced for line in body.splitlines()]
        for line in [*lines, *INDENTED.findall(FENCE.sub("", text))]:
            command = " ".join(COMMENT.sub("", line).split())
            if command and not FORMULA.match(command):
                yield Line(path.name, command)


def python_blocks() -> Iterator[Line]:
    for path in DOCUMENTS:
        bodies = [
            body
            for language, body in FENCE.findall(path.read_text())
            if language == "python" and not body.startswith(PIECE)
        ]
        if bodies and path.name not in PYTHON_ELSEWHERE:
            yield Line(path.name, "\n".join(bodies))


#: Each once, by the document that has it first.
LINES = list({line.text: line for line in reversed(list(shell_lines()))}.values())[::-1]
SHELL = [line for line in LINES if line.elsewhere is None]
AWAY = [line for line in LINES if line.elsewhere is not None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whatever a line names, by that name."""
    folder = tmp_path_factory.mktemp("models")
    original = tiny.save("gemma3_text", folder / "gemma-3-270m", torch.bfloat16)
    tiny_tokenizer().save_pretrained(original)
    folded = folder / "gemma-3-270m-folded"
    convert(original, folded)
    gguf = norm_files.write_gguf(original, folder / "model.gguf")
    awq = {"quantization_config": norm_files.QUANTIZERS["awq"]}
    norm_files.write_folder(original, folder / "my-awq-export", norm_files.scaled_gain, config=awq)
    name = "model.layers.0.input_layernorm.weight"
    np.save(folder / "gain.npy", norm_files.norms_of(original)[name].w + np.float32(1))
    (folder / "my-runtime").write_text("#!/bin/sh\ncat norm.npy\n")
    (folder / "my-runtime").chmod(0o755)
    np.save(
        folder / "norm.npy", norm_files.norms_of(original)["model.norm.weight"].w + np.float32(1)
    )
    for link, target in {
        "FILE": gguf,
        "a-checkpoint-of-it": original,
        "ORIGINAL": original,
        "folded": folded,
        "gemma-3-27b-it": original,
        "gemma-3-270m-Q4_K_M.gguf": gguf,
    }.items():
        (folder / link).symlink_to(target.name)
    return folder


@pytest.fixture(scope="module")
def environment(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Hub that holds the model by the names that the documents use, and takes uploads."""
    home = tmp_path_factory.mktemp("home")
    with HubServer() as hub:
        (home / "uploads").mkdir()
        hub.allow_uploads(home / "uploads", TOKEN)
        for name in ("gemma-3-270m", "gemma-3-27b-it"):
            hub.add(f"google/{name}", models / "gemma-3-270m")
        ours = {
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "MODEL": "google/gemma-3-270m",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        yield os.environ | hub.environment(home) | ours


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Path:
    """A folder with a copy of all that, to change."""
    return Path(shutil.copytree(models, tmp_path / "place", symlinks=True))


def make_room(place: Path, text: str) -> None:
    """Outputs of a line are not there yet."""
    for name in re.findall(r'-o (\S+)|convert\("[^"]+", "([^"]+)"\)', text):
        path = place / "".join(name)
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("line", [line.param() for line in SHELL])
def test_shell(line: Line, place: Path, environment: dict[str, str]) -> None:
    finish(["bash", "-c", f"set -o pipefail; {line.text}"], line, place, environment)


@pytest.mark.parametrize("line", [line.param() for line in python_blocks()])
def test_python(line: Line, place: Path, environment: dict[str, str]) -> None:
    program = PRELUDES.get(line.document, "") + line.text
    finish([sys.executable, "-c", program], line, place, environment)


def finish(command: list[str], line: Line, place: Path, environment: dict[str, str]) -> None:
    """Run it to its end, which has to be a good one."""
    make_room(place, line.text)
    done = subprocess.run(
        command,
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patience.seconds(300),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_python_that_runs_elsewhere() -> None:
    for by in PYTHON_ELSEWHERE.values():
        assert (ROOT / by).is_file()


@pytest.mark.parametrize("line", AWAY, ids=lambda line: f"{line.document}: {line.text[:60]}")
def test_what_runs_elsewhere(line: Line) -> None:
    """That its options exist, and extras and targets, is test_docs_commands.py's to say."""
    assert line.elsewhere is not None and (ROOT / line.elsewhere).is_file()


def test_the_config_of_a_folded_checkpoint_is_as_shown(models: Path) -> None:
    [shown] = [
        json.loads(body)
        for language, body in FENCE.findall((ROOT / "docs" / "format.md").read_text())
        if language == "json"
    ]
    written = json.loads((models / "gemma-3-270m-folded" / "config.json").read_text())
    assert list(written) == list(shown)
    assert list(written["gemma_fold"]) == list(shown["gemma_fold"])
    for key in ("architectures", "model_type", "dtype"):
        assert written[key] == shown[key]
