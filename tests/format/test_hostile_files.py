"""Hostile files: each ends in one CheckpointError that names the field, and time stays linear."""

from __future__ import annotations

import gc
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CONFIG, tree, write_checkpoint
from commands import run

from gemma_fold.checkpoint.header import parse_header
from gemma_fold.checkpoint.source import open_checkpoint, parse_json_object
from gemma_fold.commands.convert import convert
from gemma_fold.errors import CheckpointError
from gemma_fold.format.manifest import Manifest, parse_manifest
from gemma_fold.rules import Verdict, classify

NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    convert(write_checkpoint(folder / "model", shards=2), folder / "folded")
    return folder / "folded"


@pytest.fixture()
def document(folded: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folded / "gemma_fold.json").read_bytes())
    return value


def parse(document: dict[str, Any]) -> Manifest:
    return parse_manifest(json.dumps(document).encode(), "gemma_fold.json")


def test_a_manifest_reads_back_as_it_was_written(folded: Path) -> None:
    raw = (folded / "gemma_fold.json").read_bytes()
    assert parse_manifest(raw, "gemma_fold.json").to_bytes() == raw


Change = Callable[[dict[str, Any]], object]


def top(key: str, value: object) -> Change:
    return lambda d: d.update({key: value})


def tensor(key: str, value: object) -> Change:
    return lambda d: d["tensors"][NORM].update({key: value})


def file(key: str, value: object, name: str = SHARD) -> Change:
    return lambda d: d["files"][name].update({key: value})


def exceptions(**changes: object) -> Change:
    def change(d: dict[str, Any]) -> None:
        found = next(t["exceptions"] for t in d["tensors"].values() if t.get("exceptions"))
        found.update(changes)

    return change


DAMAGE: dict[str, tuple[Change, str]] = {
    "files a list": (top("files", []), "invalid files in .*expected a map"),
    "tensors a string": (top("tensors", "x"), "invalid tensors in .*expected a map"),
    "a file a number": (lambda d: d["files"].update({SHARD: 5}), f"file {SHARD} in .*a map, got 5"),
    "source null": (top("source", None), "invalid source in .*expected a map"),
    "source name": (top("source", {"name": 1}), "invalid name of source .*expected a string"),
    "lock a number": (top("tensor_lock", 1), "invalid tensor_lock in .*true or false, got 1"),
    "index a number": (top("index", 1), "invalid index in .*expected a string"),
    "index a map": (top("index", {}), "invalid index in .*expected a string"),
    "index not JSON": (top("index", "x"), "index of gemma_fold.json is not valid JSON"),
    "index without name": (top("index_name", None), "one of index and index_name"),
    "index name elsewhere": (top("index_name", "../x" + INDEX), "points outside the folder"),
    "index name below": (top("index_name", "a/" + INDEX), "points outside the folder"),
    "index name of no index": (top("index_name", SHARD), "not the name of a weight index"),
    "index name of no file": (top("index_name", "other" + INDEX), "weight index among its files"),
    "config a map": (top("config", {}), "invalid config in .*expected a string"),
    "config not JSON": (top("config", "{"), "config of gemma_fold.json is not valid JSON"),
    "architectures": (top("config", '{"architectures": 5}'), "invalid architectures in config"),
    "version": (top("version", None), "invalid version"),
    "format true": (top("format", True), "names no format"),
    "format huge": (top("format", 10**300), "upgrade gemma-fold"),
    "offset true": (tensor("offset", True), f"invalid offset of tensor {NORM} in "),
    "offset a string": (tensor("offset", "1"), "invalid offset of tensor"),
    "offset huge": (tensor("offset", 10**350), "expected a number"),
    "offset infinite": (tensor("offset", float("inf")), "expected a number"),
    "offset NaN": (tensor("offset", float("nan")), "expected a number"),
    "shape negative": (tensor("shape", [-24]), "invalid shape of tensor"),
    "shape bool": (tensor("shape", [True]), "invalid shape of tensor"),
    "shape float": (tensor("shape", [24.0]), "invalid shape of tensor"),
    "shape huge": (tensor("shape", [2**70]), "invalid shape of tensor"),
    "shape of two": (tensor("shape", [24, 1]), "invalid shape of tensor"),
    "shape empty": (tensor("shape", []), "invalid shape of tensor"),
    "shape a number": (tensor("shape", 24), "invalid shape of tensor"),
    "shape of another": (
        lambda d: d["tensors"][NORM].update(shape=[23], exceptions=None),
        f"'{NORM}' is BF16 .23., but the header",
    ),
    "dtype": (tensor("dtype", "F8_E4M3"), "invalid dtype of tensor"),
    "dtype of another": (tensor("dtype", "F16"), "is F16 .*but the header"),
    "norm": (tensor("norm", ["rms_norm"]), "invalid norm of tensor"),
    "add_dtype": (tensor("add_dtype", "float16"), "invalid add_dtype"),
    "blake3 short": (tensor("blake3", "ab"), "invalid blake3 of tensor.*64 hexadecimal"),
    "blake3 no hex": (tensor("blake3", "g" * 64), "64 hexadecimal"),
    "blake3 with a line": (tensor("blake3", "a" * 64 + "\n"), "64 hexadecimal"),
    "non_finite": (tensor("non_finite", 25), "invalid non_finite"),
    "file of a tensor": (tensor("file", "/etc/passwd"), "points outside the folder"),
    "other file": (tensor("file", "tokenizer.json"), "but the header of 'tokenizer.json'"),
    "exceptions a list": (tensor("exceptions", [1]), "invalid exceptions of tensor"),
    "count": (exceptions(count=10**9), "invalid count of exceptions"),
    "bits no base64": (exceptions(bits="!"), "invalid bits .*base64"),
    "bits too short": (exceptions(bits="AA=="), "invalid bits .*base64 of"),
    "bits a number": (exceptions(bits=1), "invalid bits"),
    "index too short": (exceptions(count=1, bits="AAA=", index="AAA="), "index .*ascending"),
    "index outside": (exceptions(count=1, bits="AAA=", index="/////w=="), "invalid index"),
    "size negative": (file("size", -1), "invalid size of file"),
    "size bool": (file("size", True), "invalid size of file"),
    "size huge": (file("size", 10**30), "invalid size of file"),
    "size of another": (file("size", 12345), "header of model-00001.*truncated|data after"),
    "sha256 of a file": (file("sha256", 5), "invalid sha256 of file"),
    "header a number": (file("header", 5), "invalid header of file"),
    "header not JSON": (file("header", "{"), f"header of {SHARD} in gemma_fold.json: damaged"),
    "directories": (top("directories", [1]), "invalid directories"),
    "directory above": (top("directories", [".."]), "points outside the folder"),
    "file above": (lambda d: d["files"].update({"../x": {"size": 1}}), "points outside the folder"),
    "device": (lambda d: d["files"].update({"NUL": {"size": 1}}), "points outside the folder"),
    "file in a file": (
        lambda d: d["files"].update({"tokenizer.json/x": {"size": 1}}),
        "'tokenizer.json' is both a file and a folder",
    ),
    "folder as a file": (top("directories", ["tokenizer.json"]), "both a file and a folder"),
    "manifest": (lambda d: d["files"].update({"gemma_fold.json": {"size": 1}}), "no original has"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_manifest_names_the_field(case: str, document: dict[str, Any]) -> None:
    change, message = DAMAGE[case]
    change(document)
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(document)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["source", "model_type", "tensor_lock", "config", "files",
                                 "directories", "tensors", "version"])  # fmt: skip
def test_a_missing_key_is_named(key: str, document: dict[str, Any]) -> None:
    del document[key]
    with pytest.raises(CheckpointError, match=f"invalid {key} in .*got nothing"):
        parse(document)


@pytest.mark.parametrize(
    "raw",
    [
        rb'{"a": "\ud800"}',
        rb'{"\uDFFF": 1}',
        b'{"a": "\xff"}',
        b'{"a": 1' + b"0" * 500 + b"}",
        b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        b'{"a": 1, "a": 2}',
        b"[]",
        b"",
    ],
)
def test_json_that_is_refused(raw: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        parse_json_object(raw, "config.json")


def test_a_surrogate_pair_is_text() -> None:
    assert parse_json_object(rb'{"a": "\ud83d\ude00"}', "x") == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": []}, "invalid metadata"),
        ({"metadata": {"total_size": "5"}}, "invalid total_size"),
        ({"metadata": {"total_size": float("nan")}}, "invalid total_size"),
        ({"metadata": {"total_size": True}}, "invalid total_size"),
    ],
)
def test_an_index_of_wrong_types(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", shards=2)
    index = json.loads((source / INDEX).read_bytes()) | change
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source)


# --- names and pipes on disk ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [b"new\nline", b"back\\slash", b"nul.txt", b"\xff\xfe"])
def test_a_source_file_that_could_not_be_written_back(name: bytes, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    Path(os.fsdecode(os.fsencode(source) + b"/" + name)).touch()
    with pytest.raises(CheckpointError, match=r"cannot be written everywhere.*rename it"):
        open_checkpoint(source)


@pytest.mark.parametrize("as_json", [False, True])
def test_folders_whose_names_are_no_utf8(as_json: bool, tmp_path: Path) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/model\xff"))
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/out\xfe"))
    back = Path(os.fsdecode(os.fsencode(tmp_path) + b"/back\xfe"))
    write_checkpoint(source)
    options = ("--json",) if as_json else ()
    for step in (
        ("inspect", source),
        ("convert", source, "-o", out),
        ("verify", out, "--against", source),
        ("unfold", out, "-o", back),
    ):
        result = run(*step, *options)
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
    assert tree(back) == tree(source)
    assert run("inspect", out / "absent").stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["config.json", "gemma_fold.json", "model.safetensors"])
def test_a_named_pipe_does_not_hang(name: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    for step in (("inspect", source), ("verify", source)):
        result = run(*step)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.slow
def test_links_that_multiply_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    folders = [tmp_path / f"d{i}" for i in range(16)]
    for folder in folders:
        folder.mkdir()
    for folder, below in itertools.pairwise(folders):
        (folder / "a").symlink_to(below)
        (folder / "b").symlink_to(below)
    (source / "links").symlink_to(folders[0])
    with pytest.raises(CheckpointError, match="holds more than"):
        open_checkpoint(source)


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "gemma\x1b[2J\nsecond line"}
    result = run("inspect", write_checkpoint(tmp_path / "model", config=config))
    assert result.returncode == 3
    assert "\x1b" not in result.stdout + result.stderr
    assert "\\x1b[2J" in result.stdout


# --- configs that multiply, and time -------------------------------------------------------------


def test_a_config_that_multiplies_is_refused() -> None:
    braces = {"model_type": "llava", "{a,b}" * 60: {"model_type": "llama"}}
    many = {"model_type": "llava"} | {f"k{i}": {"model_type": "llama"} for i in range(10_000)}
    for config in (braces, many):
        assert classify(config, {NORM: (3,)}).verdict is Verdict.UNSUPPORTED
    layers = {"model_type": "gemma3_text", "num_hidden_layers": 100_000}
    assert classify(layers, {NORM: (3,)}).verdict is Verdict.UNSUPPORTED


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, less what garbage collection takes, which depends on what else there is."""
    times = []
    for _ in range(3):
        gc.disable()
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
        gc.enable()
    return min(times)


def header(names: list[str]) -> bytes:
    entries = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
        for i, name in enumerate(names)
    }
    return json.dumps(entries).encode()


def one_key_twice(n: int) -> Callable[[], object]:
    keys = [*range(n), n - 1]
    raw = ("{" + ",".join(f'"k{key}":1' for key in keys) + "}").encode()

    def work() -> None:
        with pytest.raises(CheckpointError, match="twice"):
            parse_header(raw, data_size=None, where="x")

    return work


def many_tensors(n: int) -> Callable[[], object]:
    raw = header([f"model.layers.{i}.x.weight" for i in range(n)])
    return lambda: parse_header(raw, data_size=n, where="x")


def norm_like(pattern: str, model_type: str) -> Callable[[int], Callable[[], object]]:
    def prepare(n: int) -> Callable[[], object]:
        shapes = {pattern.format(i): (1,) for i in range(n)}
        return lambda: classify({"model_type": model_type, "num_hidden_layers": 2}, shapes)

    return prepare


LINEAR: dict[str, Callable[[int], Callable[[], object]]] = {
    "one key twice": one_key_twice,
    "many tensors": many_tensors,
    "norms of one pattern": norm_like("model.layers.{}.x_norm.weight", "gemma3_text"),
    "norms of many patterns": norm_like("model.a{}.x_norm.weight", "gemma3_text"),
    "norms of a wrapper": norm_like("model.a{}.x_norm.weight", "gemma3"),
    "norms of a plain model": norm_like("model.a{}.x_norm.weight", "llama"),
}


@pytest.mark.parametrize("case", LINEAR)
def test_time_grows_as_the_input_does(case: str) -> None:
    """Quadratic work would take 64 times as long; a busy machine does not come near to that."""
    prepare, n = LINEAR[case], 5_000
    little, much = seconds(prepare(n)), seconds(prepare(8 * n))
    assert much < 32 * max(little, 0.001), f"{little:.3f} s, then {much:.3f} s"
