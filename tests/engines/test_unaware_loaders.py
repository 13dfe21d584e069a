"""Tools that never heard of the format stop, loudly, each in a process without gemma-fold.

Between them the two locks stop everything: the config lock whatever reads `config.json`, the tensor
lock whatever does not, and whatever is fed a config from elsewhere.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    return tiny.save("gemma3_text", folder / "model", torch.bfloat16)


@pytest.fixture(scope="module")
def folded(original: Path) -> Path:
    convert(original, original.parent / "folded")
    return original.parent / "folded"


def run(program: str, checkpoint: Path, original: Path) -> subprocess.CompletedProcess[str]:
    head = "import sys\ncheckpoint, original = sys.argv[1:]\n"
    tail = "\nassert 'gemma_fold' not in sys.modules\nprint('LOADED')\n"
    return subprocess.run(
        [sys.executable, "-c", head + program + tail, str(checkpoint), str(original)],
        capture_output=True,
        text=True,
        timeout=patience.seconds(300),
    )


@pytest.mark.parametrize("loader", LOADERS)
def test_it_stops_on_a_folded_checkpoint(loader: str, original: Path, folded: Path) -> None:
    program, words = LOADERS[loader]
    result = run(program, folded, original)
    assert result.returncode != 0
    assert "LOADED" not in result.stdout
    assert words in result.stderr, result.stderr[-2000:]


def test_they_load_the_original(original: Path) -> None:
    # Without this, loaders that always stop would prove nothing about the locks.
    result = run("\n".join(program for program, _ in LOADERS.values()), original, original)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "LOADED" in result.stdout


def test_the_tensor_lock_holds_alone(original: Path, folded: Path, tmp_path: Path) -> None:
    edited = shutil.copytree(folded, tmp_path / "edited")
    shutil.copy(original / "config.json", edited / "config.json")
    for loader in ("transformers Auto class", "transformers concrete class"):
        result = run(LOADERS[loader][0], edited, original)
        assert result.returncode != 0
        assert "LOADED" not in result.stdout


def test_the_config_lock_holds_alone(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "unlocked", tensor_lock=False)
    result = run(LOADERS["transformers Auto class"][0], tmp_path / "unlocked", original)
    assert result.returncode != 0
    assert "model type `gemma_fold`" in result.stderr
