"""Tools that never heard of the format stop, loudly, each in a process without gemma-fold.

Between them the two locks stop everything: the config lock whatever reads `config.json`, the tensor
lock whatever does not, and whatever is fed a config from elsewhere.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass

import patience
import pytest
import tiny
import torch

from gemma_fold.commands.convert import convert

pytestmark = pytest.mark.slow

#: name -> (program, what its last words must say). It gets a checkpoint and a random original.
LOADERS = {
    "transformers Auto class": (
        "import transformers\ntransformers.AutoModelForCausalLM.from_pretrained(checkpoint)",
        "model type `gemma_fold`",
    ),
    "transformers concrete class": (
        "import transformers\ntransformers.Gemma3ForCausalLM.from_pretrained(checkpoint)",
        "ignore_mismatched_sizes",
    ),
    "transformers concrete class, sizes taken from elsewhere": (
        "import transformers\n"
        "config = transformers.AutoConfig.from_pretrained(original)\n"
        "transformers.Gemma3ForCausalLM.from_pretrained(checkpoint, config=config)",
        "ignore_mismatched_sizes",
    ),
    "load_state_dict(strict=False)": (
        "import transformers\nfrom safetensors.torch import load_file\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(original)\n"
        "state = load_file(checkpoint + '/model.safetensors')\n"
        "model.load_state_dict(state, strict=False)",
        "size mismatch",
    ),
    "load_state_dict(strict=False, assign=True)": (
        "import transformers\nfrom safetensors.torch import load_file\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(original)\n"
        "state = load_file(checkpoint + '/model.safetensors')\n"
        "model.load_state_dict(state, strict=False, assign=True)",
        "size mismatch",
    ),
    "safetensors' load_model": (
        "import transformers\nfrom safetensors.torch import load_model\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(original)\n"
        "load_model(model, checkpoint + '/model.safetensors', strict=False)",
        "size mismatch",
    ),
    "accelerate's load_checkpoint_in_model": (
        "import transformers, accelerate\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(original)\n"
        "accelerate.load_checkpoint_in_model(model, checkpoint)",
        "shape",
    ),
    "copy_ of every tensor": (
        "import transformers\nfrom safetensors.torch import load_file\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(original)\n"
        "state = load_file(checkpoint + '/model.safetensors')\n"
        "for name, parameter in model.named_parameters():\n"
        "    parameter.data.copy_(state[name])",
        "doesn't match the broadcast shape",
    ),
}


#: Runs each [program, checkpoint, original] in a process forked once transformers is imported.
DRIVER = """
import json, os, sys, tempfile, traceback
import transformers
transformers.AutoModelForCausalLM, transformers.Gemma3ForCausalLM

def run(program, checkpoint, original):
    with tempfile.TemporaryFile("w+") as output:
        sys.stdout.flush()
        process = os.fork()
        if not process:
            code = 1
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                exec(program, {"checkpoint": checkpoint, "original": original})
                assert "gemma_fold" not in sys.modules
                print("LOADED")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        output.seek(0)
        return [code, output.read()]

print(json.dumps([run(*one) for one in json.load(sys.stdin)]))
"""


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it printed."""

    code: int
    said: str

    def is_loaded(self) -> bool:
        assert (self.code == 0) == ("LOADED" in self.said), self.said[-2000:]
        return self.code == 0


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """What became of each loader with a folded checkpoint, and of some with others."""
    folder = tmp_path_factory.mktemp("checkpoints")
    original = tiny.save("gemma3_text", folder / "original", torch.bfloat16)
    folded, edited, unlocked = folder / "folded", folder / "edited", folder / "unlocked"
    convert(original, folded)
    shutil.copytree(folded, edited)
    shutil.copy(original / "config.json", edited / "config.json")
    convert(original, unlocked, tensor_lock=False)
    programs = {name: program for name, (program, _) in LOADERS.items()}
    jobs = {name: (program, folded) for name, program in programs.items()}
    jobs["all, the original"] = "\n".join(programs.values()), original
    for name in ("transformers Auto class", "transformers concrete class"):
        jobs[f"{name}, edited"] = programs[name], edited
    jobs["unlocked"] = programs["transformers Auto class"], unlocked
    asked = [[program, str(checkpoint), str(original)] for program, checkpoint in jobs.values()]
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=patience.seconds(300),
    )
    assert driver.returncode == 0, driver.stderr[-2000:]
    return {name: Ended(*one) for name, one in zip(jobs, json.loads(driver.stdout), strict=True)}


@pytest.mark.parametrize("loader", LOADERS)
def test_it_stops_on_a_folded_checkpoint(loader: str, ended: dict[str, Ended]) -> None:
    _, words = LOADERS[loader]
    assert not ended[loader].is_loaded()
    assert words in ended[loader].said, ended[loader].said[-2000:]


def test_they_load_the_original(ended: dict[str, Ended]) -> None:
    # Without this, loaders that always stop would prove nothing about the locks.
    assert ended["all, the original"].is_loaded()


@pytest.mark.parametrize("loader", ["transformers Auto class", "transformers concrete class"])
def test_the_tensor_lock_holds_alone(loader: str, ended: dict[str, Ended]) -> None:
    assert not ended[f"{loader}, edited"].is_loaded()


def test_the_config_lock_holds_alone(ended: dict[str, Ended]) -> None:
    assert not ended["unlocked"].is_loaded()
    assert "model type `gemma_fold`" in ended["unlocked"].said
