"""`check`: the verdict on right and wrong files of every format, norm by norm and as a whole."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import check_cases
import families
import gguf
import norm_files as files
import numpy as np
import pytest
import tiny
import torch
from check_cases import BF16, TABLE, Case, checked
from checkpoints import write_checkpoint
from norm_files import QUANTIZERS, added, only, right, rounded

from gemma_fold import CheckpointError, UnsupportedModelError, UsageError, check, convert
from gemma_fold.compare.offsets.finding import Finding


def swap(original: Path) -> files.Change:
    return files.swapped(files.norms_of(original))


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return check_cases.originals(tmp_path_factory.mktemp("originals"))


@pytest.mark.parametrize(
    ("family", "wanted"), TABLE, ids=[f"{f}-{c.form}-{c.defect}" for f, c in TABLE]
)
def test_verdict(family: str, wanted: Case, originals: dict[str, Path], tmp_path: Path) -> None:
    original = originals[family]
    report = checked(wanted, original, tmp_path)
    wrong = {norm.finding for norm in report.norms if not norm.right}
    assert wrong == ({wanted.found} if wanted.found else set()), report.verdict.line
    assert report.verdict.right is (wanted.found is None)
    assert report.verdict.exit_code == int(not report.verdict.right)
    assert {n.name for n in report.norms} == {
        re.sub(r"^(model\.|language_model\.)*", "", name).replace("index_", "indexer.")
        for name in files.norms_of(original)
        if "vision" not in name or wanted.form != "gguf"
    }


def test_table_is_wide() -> None:
    """What the table above is asked to be: files, formats and families, right and wrong."""
    assert len(TABLE) >= 200
    assert len({c.form for _, c in TABLE}) >= 10
    assert len({f for f, _ in TABLE}) >= 12
    verdicts = Counter(c.found is None for _, c in TABLE)
    assert min(verdicts.values()) >= 80


def test_what_is_kept_of_the_table_is_what_it_says() -> None:
    """The documents show it."""
    kept = json.loads(check_cases.RESULTS.read_text())
    assert kept == [check_cases.expected(*row) for row in TABLE], (
        "run `cd tests/support && python check_cases.py`, then `make docs`"
    )


class TestNumbers:
    """What is said of each norm beside its verdict."""

    def test_rounding_is_counted(self, originals: dict[str, Path], tmp_path: Path) -> None:
        original = originals["gemma3_text"]
        made = files.write_folder(original, tmp_path / "made", rounded(BF16))
        report = check(made, against=original)
        for norm in report.norms:
            w = files.norms_of(original)[f"model.{norm.name}"].w
            gamma = (w + np.float32(1)).astype(BF16).astype(np.float32)
            assert norm.changed == np.count_nonzero(gamma - 1 != w)
            # Both gains are positive or both negative here, so their bits count the steps.
            steps = np.abs(gamma.view(np.int32).astype(int) - (w + 1).view(np.int32).astype(int))
            assert norm.max_ulp == steps.max()
        changed = sum(n.changed for n in report.norms)
        total = sum(n.elements for n in report.norms)
        assert f"{changed:,} of {total:,} weights" in report.verdict.line

    def test_swapped_layers_are_named(self, originals: dict[str, Path], tmp_path: Path) -> None:
        original = originals["gemma2"]
        made = files.write_gguf(original, tmp_path / "a.gguf", swap(original))
        report = check(made, against=original)
        found = {n.name: n.of for n in report.norms if n.finding is Finding.OTHER_NORM}
        assert found["layers.0.input_layernorm.weight"] == "layers.1.input_layernorm.weight"
        assert len(found) == len(report.norms) - 1

    def test_another_offset_is_fitted(self, originals: dict[str, Path], tmp_path: Path) -> None:
        original = originals["gemma"]
        half = only("model.norm", lambda v: v - np.float32(0.625))
        report = check(files.write_gguf(original, tmp_path / "a.gguf", half), against=original)
        norm = next(n for n in report.norms if not n.right)
        assert norm.offset == pytest.approx(0.375, abs=1e-6)
        assert norm.residual is not None and norm.residual < 1e-6


@pytest.mark.parametrize(("family", "architecture"), [("plamo2", "plamo2"), ("plamo3", "plamo3")])
def test_offsets_that_are_not_1(family: str, architecture: str, tmp_path: Path) -> None:
    """PLaMo's post norms add 1/5 and 1/5^1.5: llama.cpp's converter does, and adding 1 is wrong."""
    stored = {
        "pre_mixer_norm": ("attn_norm", 1.0),
        "post_mixer_norm": ("post_attention_norm", 1 / 5),
        "pre_mlp_norm": ("ffn_norm", 1.0),
        "post_mlp_norm": ("post_ffw_norm", 1 / 5**1.5),
        "mixer.q_norm": ("attn_q_norm", 1.0),
        "mixer.k_norm": ("attn_k_norm", 1.0),
    }
    if family == "plamo2":  # its attention has no row that says what its norms are called there
        stored = {name: row for name, row in stored.items() if "mixer." not in name}
    rng = np.random.default_rng(12)
    tensors = {"model.norm.weight": rng.normal(0, 0.4, 64).astype(BF16)}
    held = {"output_norm": ("model.norm.weight", 1.0)}
    for layer, (name, (short, offset)) in itertools.product(range(2), stored.items()):
        full = f"model.layers.layers.{layer}.{name}.weight"
        tensors[full] = rng.normal(0, 0.4, 64).astype(BF16)
        held[f"blk.{layer}.{short}"] = (full, offset)
    original = write_checkpoint(
        tmp_path / "original", tensors, {"model_type": family, "num_hidden_layers": 2}
    )
    for everywhere in (None, 1.0):
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", architecture)
        writer.add_block_count(2)
        for name, (full, offset) in held.items():
            values = tensors[full].astype(np.float32) + np.float32(everywhere or offset)
            writer.add_tensor(f"{name}.weight", values)
        files.finish(writer)
        report = check(tmp_path / "a.gguf", against=original)
        wrong = {norm.name.split(".")[-2]: norm for norm in report.norms if not norm.right}
        assert wrong.keys() == ({"post_mixer_norm", "post_mlp_norm"} if everywhere else set())
        assert len(report.norms) == len(tensors)
        assert report.verdict.right is (everywhere is None)
    assert "1 + w" in wrong["post_mixer_norm"].remark
    assert wrong["post_mlp_norm"].finding is Finding.OFFSET
    assert wrong["post_mlp_norm"].offset == pytest.approx(1, abs=1e-6)


class TestScales:
    """AWQ's scales: right where they were put on the gain, wrong where they were put on w."""

    @pytest.fixture
    def original(self, tmp_path: Path) -> Path:
        rng = np.random.default_rng(3)
        tensors = {
            f"model.layers.{layer}.{name}.weight": rng.normal(0.1, 0.4, 256).astype(BF16)
            for layer in range(2)
            for name in ("input_layernorm", "post_attention_layernorm")
        } | {"model.norm.weight": rng.normal(0, 0.4, 256).astype(BF16)}
        config = {"model_type": "gemma", "num_hidden_layers": 2}
        return write_checkpoint(tmp_path / "original", tensors, config)

    @pytest.mark.parametrize("tool", ["awq", "compressed-tensors", None])
    def test_on_the_gain(self, tool: str | None, original: Path, tmp_path: Path) -> None:
        config = {"quantization_config": QUANTIZERS[tool]} if tool else {}
        made = files.write_folder(original, tmp_path / "made", files.scaled_gain, config=config)
        report = check(made, against=original)
        assert Counter(n.finding for n in report.norms) == {Finding.SCALED: 2, Finding.SAME: 3}
        assert report.verdict.right is (tool is not None)

    def test_on_w(self, original: Path, tmp_path: Path) -> None:
        config = {"quantization_config": QUANTIZERS["awq"]}
        made = files.write_folder(original, tmp_path / "made", files.scaled_w, config=config)
        report = check(made, against=original)
        assert Counter(n.finding for n in report.norms) == {Finding.SCALED_W: 2, Finding.SAME: 3}
        assert report.verdict.right is False

    def test_trained_a_little_further(self, original: Path, tmp_path: Path) -> None:
        """Signs of w are kept there, too."""

        def change(name: str, norm: files.Norm, held: int) -> files.Array:
            return norm.w * np.random.default_rng(8).uniform(0.98, 1.02, norm.w.size)

        made = files.write_folder(original, tmp_path / "made", change, dtype=np.float32)
        report = check(made, against=original)
        assert {(n.finding, n.added) for n in report.norms} == {(Finding.CHANGED, 0)}
        assert all("trained further" in n.remark for n in report.norms)

    def test_on_the_gain_but_folded(self, original: Path, tmp_path: Path) -> None:
        def change(name: str, norm: files.Norm, held: int) -> files.Array:
            extra = 1 if "input_layernorm" in name else 0
            return files.scaled_gain(name, norm, held) + np.float32(extra)

        config = {"quantization_config": QUANTIZERS["awq"]}
        made = files.write_folder(original, tmp_path / "made", change, config=config)
        report = check(made, against=original)
        assert Counter(n.finding for n in report.norms) == {Finding.UNASKED: 2, Finding.SAME: 3}


class TestTensors:
    """Single norms of a runtime."""

    def test_gamma(self, originals: dict[str, Path], tmp_path: Path) -> None:
        original = originals["qwen3_next"]
        given = files.write_arrays(original, tmp_path / "arrays")
        assert check(tensors=given, against=original).verdict.right is True
        given = files.write_arrays(original, tmp_path / "raw", added(-1))
        assert check(tensors=given, against=original).verdict.right is False
        assert check(tensors=given, against=original, expect="w").verdict.right is True

    @pytest.mark.parametrize("dtype", [np.float64, BF16, np.float16])
    def test_dtypes_and_names_of_gguf(
        self, dtype: type, originals: dict[str, Path], tmp_path: Path
    ) -> None:
        original = originals["gemma3_text"]
        w = files.norms_of(original)["model.layers.1.post_feedforward_layernorm.weight"].w
        np.save(tmp_path / "gain.npy", (w + np.float32(1)).astype(dtype))
        given = [f"blk.1.post_ffw_norm={tmp_path / 'gain.npy'}"]
        report = check(tensors=given, against=original)
        wanted = Finding.FOLDED if dtype is np.float64 else Finding.ROUNDED
        assert [n.finding for n in report.norms] == [wanted]

    def test_standard_input(
        self, originals: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = originals["gemma"]
        stream = io.BytesIO()
        np.save(stream, files.norms_of(original)["model.norm.weight"].w + np.float32(1))
        stream.seek(0)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream))
        assert check(tensors=["norm=-"], against=original).verdict.right is True

    @pytest.mark.parametrize(
        "given", [["norm"], ["norm="], ["=a.npy"], ["nothing=a.npy"], ["a=-", "b=-"]]
    )
    def test_nonsense(self, given: list[str], originals: dict[str, Path], tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.zeros(32, np.float32))
        given = [g.replace("a.npy", str(tmp_path / "a.npy")) for g in given]
        with pytest.raises(UsageError):
            check(tensors=given, against=originals["gemma"])

    @pytest.mark.parametrize(
        "content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{", b"x" * 100]
    )
    def test_damaged(self, content: bytes, originals: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"no \.npy file"):
            check(tensors=[f"norm={tmp_path / 'a.npy'}"], against=originals["gemma"])

    @pytest.mark.parametrize("array", [np.zeros((2, 3)), np.zeros(3, int), np.zeros(3, object)])
    def test_no_norm(self, array: files.Array, originals: dict[str, Path], tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(CheckpointError):
            check(tensors=[f"norm={tmp_path / 'a.npy'}"], against=originals["gemma"])


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original whose gains are as trained ones are: nearly all positive, some near zero."""
    rng = np.random.default_rng(4)

    def norm() -> files.Array:
        return (np.exp(rng.normal(0.5, 0.9, 512)) - 1).astype(BF16)

    tensors = {
        f"model.layers.{layer}.{name}.weight": norm()
        for layer in range(4)
        for name in ("input_layernorm", "post_attention_layernorm")
    } | {"model.norm.weight": norm()}
    config = {"model_type": "gemma", "num_hidden_layers": 4}
    return write_checkpoint(tmp_path_factory.mktemp("trained") / "original", tensors, config)


class TestAlone:
    """Without the original: what the numbers themselves show, and no more."""

    @pytest.mark.parametrize(
        ("change", "dtype", "added_times", "sure", "is_right"),
        [
            (right, np.float32, 1, "bits", True),
            (added(-1), np.float32, 0, "statistics", False),
            (added(1), np.float32, 2, "bits", False),
            (right, BF16, 1, "statistics", False),
        ],
    )
    def test_gguf(
        self,
        change: files.Change,
        dtype: type,
        added_times: int,
        sure: str,
        is_right: bool,
        trained: Path,
        tmp_path: Path,
    ) -> None:
        report = check(files.write_gguf(trained, tmp_path / "a.gguf", change, dtype))
        assert report.evidence is not None
        assert (report.evidence.added, report.evidence.sure) == (added_times, sure)
        assert report.verdict.right is is_right

    @pytest.mark.parametrize(
        ("change", "added_times", "rounding", "is_right"),
        [
            (right, 0, "", True),
            (added(1), 1, "", False),
            (rounded(BF16), 0, "bf16", False),
        ],
    )
    def test_folder(
        self,
        change: files.Change,
        added_times: int,
        rounding: str,
        is_right: bool,
        trained: Path,
        tmp_path: Path,
    ) -> None:
        report = check(files.write_folder(trained, tmp_path / "made", change))
        assert report.evidence is not None
        assert (report.evidence.added, report.evidence.rounding) == (added_times, rounding)
        assert report.verdict.right is is_right

    @pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
    def test_gains_that_are_all_above_1(self, dtype: type, tmp_path: Path) -> None:
        """Such weights look like gammas by their shares; nobody made those of such fine numbers."""
        rng = np.random.default_rng(7)
        names = ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm")
        tensors = {
            f"model.{name}.weight": rng.uniform(0.01, 1.5, 256).astype(dtype) for name in names
        }
        config = {"model_type": "gemma", "num_hidden_layers": 1}
        original = write_checkpoint(tmp_path / "original", tensors, config)
        assert check(original).verdict.right is None
        folded = files.write_folder(original, tmp_path / "folded", added(1))
        assert check(folded).verdict.right is False

    def test_too_little_to_tell(self, originals: dict[str, Path]) -> None:
        report = check(originals["nemotron"])
        assert report.verdict.right is None
        assert report.verdict.exit_code == 2
        assert "--against" in report.verdict.line

    def test_plain_family(self, originals: dict[str, Path]) -> None:
        report = check(originals["llama"])
        assert report.evidence is None
        assert report.verdict.exit_code == 2


class TestSides:
    """What either side may be."""

    def test_gguf_as_the_original(self, originals: dict[str, Path], tmp_path: Path) -> None:
        original = originals["gemma3_text"]
        gguf = files.write_gguf(original, tmp_path / "a.gguf")
        assert check(original, against=gguf).verdict.right is True
        doubled = files.write_gguf(original, tmp_path / "b.gguf", added(1))
        assert check(doubled, against=gguf).verdict.right is False
        folded = files.write_folder(original, tmp_path / "folded", added(1), dtype=np.float32)
        assert check(folded, against=gguf).verdict.right is False

    def test_split_gguf_and_folder_of_one(self, originals: dict[str, Path], tmp_path: Path) -> None:
        original = originals["gemma"]
        first = tmp_path / "m" / "m-00001-of-00002.gguf"
        first.parent.mkdir()
        files.write_gguf(original, first, drop="model.norm")
        second = first.with_name("m-00002-of-00002.gguf")
        files.write_gguf(original, second, drop="layers")
        with pytest.raises(CheckpointError, match="twice"):
            check(_with_same_norm(original, tmp_path), against=original)
        report = check(first.parent, against=original)
        assert report.verdict.right is True
        assert len(report.norms) == len(files.norms_of(original))
        second.unlink()
        with pytest.raises(CheckpointError, match="no such file"):
            check(first, against=original)

    def test_vision_wrapper_beside_its_text_model(
        self, originals: dict[str, Path], tmp_path: Path
    ) -> None:
        wrapper = tiny.save("gemma3", tmp_path / "wrapper", torch.bfloat16)
        tensors = files.read_tensors(wrapper)
        config = json.loads((wrapper / "config.json").read_text())
        text = {n.replace("language_model.", ""): t for n, t in tensors.items() if "language" in n}
        alone = write_checkpoint(tmp_path / "text", text, config["text_config"])
        report = check(alone, against=wrapper)
        assert report.verdict.right is True
        assert "multi_modal_projector.mm_soft_emb_norm.weight" in report.left_out

    def test_layouts_of_vendors(self, originals: dict[str, Path], tmp_path: Path) -> None:
        """The same norms by other names; Muse Glimmer's use a name of transformers for another."""
        renamed = {
            "muse_glimmer_text": {
                "post_attention_layernorm": "post_attn_norm",
                "pre_feedforward_layernorm": "post_attention_layernorm",
                "post_feedforward_layernorm": "post_ffn_norm",
            },
            "minimax_m3_vl_text": {
                "indexer.q_norm": "index_q_norm",
                "indexer.k_norm": "index_k_norm",
            },
        }
        for family, names in renamed.items():
            original = originals[family]
            pattern = re.compile("|".join(map(re.escape, names)))
            tensors = {
                pattern.sub(lambda m, names=names: names[m[0]], name): tensor
                for name, tensor in files.read_tensors(original).items()
            }
            config = json.loads((original / "config.json").read_text())
            vendor = write_checkpoint(tmp_path / family, tensors, config)
            made = files.write_gguf(original, tmp_path / f"{family}.gguf")
            for one, two in (
                (original, vendor),
                (vendor, original),
                (made, vendor),
                (made, original),
            ):
                report = check(one, against=two)
                assert report.verdict.right is True, report.verdict.line
                assert len(report.norms) == len(files.norms_of(original)) and not report.left_out
        name = "layers.0.post_attention_layernorm.weight"
        gain = files.read_tensors(tmp_path / "muse_glimmer_text")[name].astype(np.float32) + 1
        np.save(tmp_path / "gain.npy", gain)
        given = [f"{name}={tmp_path / 'gain.npy'}"]
        report = check(tensors=given, against=tmp_path / "muse_glimmer_text")
        assert report.norms[0].name == "layers.0.pre_feedforward_layernorm.weight"
        assert report.verdict.right is True
        assert check(tensors=given, against=originals["muse_glimmer_text"]).verdict.right is False

    @pytest.mark.parametrize("family", families.FAMILIES)
    def test_itself_and_its_fold_are_right(self, family: str, tmp_path: Path) -> None:
        original = tmp_path / "original"
        families.build(family, torch.bfloat16).save_pretrained(original)
        convert(original, tmp_path / "folded")
        for file in (original, tmp_path / "folded"):
            report = check(file, against=original)
            assert report.verdict.right is True, report.verdict.line
            assert report.norms and not report.left_out

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
    def test_adapter_merged_by_peft(self, originals: dict[str, Path], tmp_path: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        original = originals["gemma3_text"]
        model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
        adapted = get_peft_model(
            model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        )
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        report = check(tmp_path / "merged", against=original)
        assert report.verdict.right is True and len(report.norms) == 13

    def test_unknown_model(self, tmp_path: Path, originals: dict[str, Path]) -> None:
        unknown = write_checkpoint(tmp_path / "unknown", None, {"model_type": "who"})
        with pytest.raises(UnsupportedModelError):
            check(originals["gemma"], against=unknown)

    def test_incomplete_original(self, originals: dict[str, Path], tmp_path: Path) -> None:
        less = files.write_folder(originals["gemma"], tmp_path / "less", drop="model.norm")
        with pytest.raises(CheckpointError, match="lacks"):
            check(originals["gemma"], against=less)

    def test_usage(self, originals: dict[str, Path]) -> None:
        for arguments in ({}, {"file": "a", "tensors": ["a=b"]}, {"tensors": ["a=b"]}):
            with pytest.raises(UsageError):
                check(**arguments)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="neither w nor gamma"):
            check(originals["gemma"], expect="both")


def _with_same_norm(original: Path, folder: Path) -> Path:
    """Two parts that both hold the final norm."""
    first = folder / "twice-00001-of-00002.gguf"
    files.write_gguf(original, first)
    files.write_gguf(original, first.with_name("twice-00002-of-00002.gguf"), drop="layers")
    return first
