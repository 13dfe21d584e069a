"""Files that anyone may have written: one line and an exit code, or a verdict, and never a pass."""

from __future__ import annotations

import json
import re
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import norm_files as files
import numpy as np
import pytest
from checkpoints import Tensors, read_tensors, write_checkpoint
from commands import run_here

from gemma_fold import CheckpointError, GemmaFoldError, check
from gemma_fold.compare.offsets.finding import Finding

BF16 = ml_dtypes.bfloat16
CONFIG = {"model_type": "gemma", "num_hidden_layers": 2}
NAMES = [
    f"model.layers.{layer}.{name}.weight"
    for layer in range(2)
    for name in ("input_layernorm", "post_attention_layernorm")
] + ["model.norm.weight"]
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def tensors(size: int = 64) -> Tensors:
    rng = np.random.default_rng(11)
    return {name: rng.normal(0.2, 0.6, size).astype(BF16) for name in NAMES}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "original", tensors(), CONFIG)


def write(path: Path, norms: dict[str, files.Array], architecture: str = "gemma") -> Path:
    """A GGUF file with these tensors, whatever they are called."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    for name, values in norms.items():
        writer.add_tensor(name, values)
    files.finish(writer)
    return path


class TestNumbers:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, -0.0, 1e-45])
    def test_a_weight_of_the_file(self, bad: float, original: Path, tmp_path: Path) -> None:
        """It is no weight of the original: wrong, whatever the others are."""

        def change(name: str, norm: files.Norm, held: int) -> files.Array:
            values = norm.w + np.float32(1)
            values[3] = bad
            return values

        report = check(files.write_gguf(original, tmp_path / "a.gguf", change), against=original)
        assert report.verdict.right is False
        assert all(norm.changed >= 1 for norm in report.norms)
        assert not any(norm.right for norm in report.norms)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
    @pytest.mark.parametrize("places", [slice(3, 4), slice(None)])
    def test_weights_of_the_original(self, bad: float, places: slice, tmp_path: Path) -> None:
        """A faithful conversion is right even then, and one without the offset is wrong."""
        held = tensors()
        for values in held.values():
            values[places] = bad
        original = write_checkpoint(tmp_path / "original", held, CONFIG)
        right = files.write_gguf(original, tmp_path / "a.gguf")
        assert check(right, against=original).verdict.right is True
        raw = files.write_gguf(original, tmp_path / "b.gguf", files.added(-1))
        told = not np.isfinite(bad) and places == slice(None)  # then there is nothing to tell by
        assert check(raw, against=original).verdict.right is told

    def test_alone_with_nothing_finite(self, tmp_path: Path) -> None:
        held = {name: np.full(64, np.nan, BF16) for name in NAMES}
        report = check(write_checkpoint(tmp_path / "nan", held, CONFIG))
        assert report.verdict.right is None
        printed = run_here("check", tmp_path / "nan", "--json").stdout
        found = json.loads(printed, parse_constant=pytest.fail)  # NaN is no JSON
        assert found["evidence"]["mean"] is None

    def test_no_elements(self, original: Path, tmp_path: Path) -> None:
        empty = write_checkpoint(tmp_path / "empty", tensors(0), CONFIG)
        report = check(empty, against=original)
        assert {norm.finding for norm in report.norms} == {Finding.SHAPE}
        assert check(original, against=empty).verdict.right is False
        assert check(empty).verdict.right is None


class TestNames:
    def test_two_tensors_for_one_norm(self, original: Path, tmp_path: Path) -> None:
        held = {name: np.ones(64, np.float32) for name in ("output_norm.weight", "norm.weight")}
        made = write(tmp_path / "a.gguf", held)
        with pytest.raises(CheckpointError, match=r"output_norm\.weight and norm\.weight"):
            check(made, against=original)

    def test_two_wrappers_for_one_norm(self, original: Path, tmp_path: Path) -> None:
        """Which of the two a loader takes, nobody knows."""
        held = read_tensors(original)
        twice = held | {f"language_model.{n}": t + BF16(1) for n, t in held.items()}
        made = write_checkpoint(tmp_path / "twice", twice, CONFIG)
        assert check(made, against=original).verdict.right is not True

    @pytest.mark.parametrize("text", ["\x1b[31mred\x1b]0;title\x07", "a\rb\nc", "<b>&", "‮txt"])
    def test_escapes_are_not_printed(self, text: str, original: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        held = read_tensors(original) | {f"{text}.norm.weight": np.ones(4, BF16)}
        config = CONFIG | {"quantization_config": {"quant_method": f"{text}\nright: all"}}
        made = write_checkpoint(tmp_path / "made", held, config)
        page = tmp_path / "page.html"
        assert run_here("check", made, "--against", original).stdout.count("\nright: ") == 1
        for arguments in ((), ("--json",), ("--all",), ("--html", page)):
            done = run_here("check", made, "--against", original, *arguments)
            assert not _CONTROL.search(done.stdout + done.stderr)
        assert "<b>&" not in page.read_text()
        assert not _CONTROL.search(page.read_text())

    def test_escapes_in_a_gguf_file(self, tmp_path: Path) -> None:
        made = write(tmp_path / "a.gguf", {}, "\x1b[31mred\n")
        done = run_here("check", made)
        assert done.returncode == 3 and not _CONTROL.search(done.stderr)
        assert done.stderr.count("\n") == 1

    @pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "a\0b"])
    def test_an_index_that_points_elsewhere(
        self, name: str, original: Path, tmp_path: Path
    ) -> None:
        index = {"weight_map": dict.fromkeys(NAMES, name)}
        (original / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError):
            check(original)


Damage = Callable[[Path], None]


class TestClaims:
    @pytest.mark.parametrize("layers", [10**9, -1, 10**30, "two", [2], None, 2.5])
    def test_of_layers(self, layers: Any, original: Path, tmp_path: Path) -> None:
        config = CONFIG | {"num_hidden_layers": layers}
        made = write_checkpoint(tmp_path / "made", tensors(), config)
        for sides in ({"file": made, "against": original}, {"file": original, "against": made}):
            try:
                report = check(**sides)
            except GemmaFoldError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
            else:
                assert len(report.norms) == len(NAMES)

    @pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
    def test_every_truncation_of_a_folder(self, part: str, original: Path) -> None:
        raw = (original / part).read_bytes()
        for length in range(0, len(raw) - 1, 1 if part == "config.json" else 31):
            (original / part).write_bytes(raw[:length])
            with pytest.raises(CheckpointError) as caught:
                check(original)
            assert "\n" not in str(caught.value)

    def test_a_matrix_beyond_the_end(self, original: Path, tmp_path: Path) -> None:
        """A download that broke off after the norms is noticed, though no matrix is read."""
        held = {"output_norm.weight": np.ones(64, np.float32)}
        held |= {f"blk.{n}.ffn_up.weight": np.ones((64, 64), np.float32) for n in range(2)}
        made = write(tmp_path / "a.gguf", held)
        check(made, against=original)
        raw = made.read_bytes()
        made.write_bytes(raw[: len(raw) - 3 * 64 * 64])
        check(made, against=original)  # where the last one ends, only its type says
        made.write_bytes(raw[: len(raw) - 5 * 64 * 64])
        with pytest.raises(CheckpointError, match=r"ffn_up\.weight' reaches beyond its end"):
            check(made, against=original)

    def test_norms_of_many_gigabytes(self, tmp_path: Path) -> None:
        """In holes of a file that takes no space."""
        size, count = 1 << 21, 64
        header = [b"GGUF", struct.pack("<IQQ", 3, count, 1)]
        header.append(struct.pack("<Q20sIQ5s", 20, b"general.architecture", 8, 5, b"gemma"))
        for n in range(count):
            name = f"blk.{n}.attn_norm.weight".encode()
            header.append(struct.pack("<Q", len(name)) + name)
            header.append(struct.pack("<IQIQ", 1, size, 0, 4 * size * n))
        with open(tmp_path / "a.gguf", "wb") as file:
            file.write(b"".join(header))
            file.truncate(1 << 30)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError, match="more than those of any model"):
            check(tmp_path / "a.gguf")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10

    @pytest.mark.parametrize("shape", [(1 << 40,), (1 << 20, 1 << 20), (-1,), (0,)])
    def test_of_an_array(self, shape: tuple[int, ...], original: Path, tmp_path: Path) -> None:
        header = str({"descr": "<f4", "fortran_order": False, "shape": shape}).encode()
        raw = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n"
        (tmp_path / "a.npy").write_bytes(raw + bytes(16))
        try:
            report = check(tensors=[f"norm={tmp_path / 'a.npy'}"], against=original)
        except CheckpointError as error:
            assert "\n" not in str(error)
        else:
            assert {norm.finding for norm in report.norms} == {Finding.SHAPE}


class TestQuantizers:
    """A quantizer's scales are right in a folder that says it is quantized, wherever it does."""

    @pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", None])
    def test_of_older_tools(self, file: str | None, tmp_path: Path) -> None:
        original = write_checkpoint(tmp_path / "original", tensors(256), CONFIG)
        made = files.write_folder(original, tmp_path / "made", files.scaled_gain)
        if file is not None:
            (made / file).write_text("{}")
        report = check(made, against=original)
        assert Finding.SCALED in {norm.finding for norm in report.norms}
        assert report.verdict.right is (file is not None)
