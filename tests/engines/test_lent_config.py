"""The original config of a folded checkpoint stays off the disk without the original weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
import transformers

import gemma_fold
from gemma_fold.commands.convert import convert
from gemma_fold.engines.transformers import install
from gemma_fold.errors import UsageError

install()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("gemma3_text", tmp_path_factory.mktemp("lent") / "original", torch.bfloat16)


@pytest.fixture(scope="module")
def folded(original: Path) -> Path:
    convert(original, original.parent / "folded")
    return original.parent / "folded"


@pytest.mark.parametrize("kind", [transformers.AutoConfig, transformers.Gemma3TextConfig])
def test_a_config_alone_is_not_saved(kind: type, folded: Path, tmp_path: Path) -> None:
    config = copy.deepcopy(kind.from_pretrained(folded))
    with pytest.raises(UsageError, match="is a folded checkpoint") as caught:
        config.save_pretrained(tmp_path / "merged")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="is a folded checkpoint"):
        config.to_json_file(tmp_path / "config.json")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_it_says_what_the_original_says(original: Path, folded: Path) -> None:
    plain = transformers.AutoConfig.from_pretrained(original)
    lent = transformers.AutoConfig.from_pretrained(folded)
    assert lent.to_dict() == {**plain.to_dict(), "_name_or_path": str(folded)}
    assert "gemma_fold" not in lent.to_json_string()


def test_an_originals_config_is_saved(original: Path, tmp_path: Path) -> None:
    transformers.AutoConfig.from_pretrained(original).save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "gemma3_text"


def test_models_save(folded: Path, tmp_path: Path) -> None:
    """Loaded ones, with a config given or not, their config too, and new ones of that config."""
    config = transformers.AutoConfig.from_pretrained(folded)
    loaded = gemma_fold.load(folded, config=config)
    loaded.save_pretrained(tmp_path / "loaded")
    gemma_fold.unfold_model(loaded).save_pretrained(tmp_path / "unfolded")
    loaded.config.save_pretrained(tmp_path / "config")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "new")
    types = {
        name: transformers.PreTrainedConfig._dict_from_json_file(tmp_path / name / "config.json")[
            "model_type"
        ]
        for name in ("loaded", "unfolded", "config", "new")
    }
    assert types == {
        "loaded": "gemma_fold",
        "unfolded": "gemma3_text",
        "config": "gemma3_text",
        "new": "gemma3_text",
    }
