"""`gemma_fold.json` and the folded `config.json`: what format 1 writes beside the weights.

The manifest holds whatever is needed to verify a folded checkpoint and to unfold it to the very
bytes it came from; `docs/format.md` describes every key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_fold._version import __version__
from gemma_fold.checkpoint.source import CONFIG, MANIFEST, Origin, parse_json_object
from gemma_fold.errors import CheckpointError
from gemma_fold.fold import Exceptions
from gemma_fold.rules import Fold

FORMAT = 1
MODEL_TYPE = "gemma_fold"
ARCHITECTURE_PREFIX = "GemmaFold"


@dataclass(frozen=True, slots=True)
class FoldedTensor:
    """One tensor that was folded, and all it takes to turn it back.

    Attributes:
        name: its name, the same before and after.
        file: the weight file that holds it.
        family: model type of the rule that decided.
        pattern: the rule's pattern.
        fold: the arithmetic.
        shape: the original shape, `(H,)`.
        dtype: the original dtype.
        sha256: of the original bytes.
        non_finite: how many NaN or infinite elements it has.
        exceptions: original bits that subtracting the offset does not give back.
    """

    name: str
    file: str
    family: str
    pattern: str
    fold: Fold
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    non_finite: int = 0
    exceptions: Exceptions | None = None

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {
            "file": self.file,
            "family": self.family,
            "pattern": self.pattern,
            "norm": self.fold.norm,
            "offset": self.fold.offset,
            "add_dtype": self.fold.add_dtype,
            "mul_dtype": self.fold.mul_dtype,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "sha256": self.sha256,
        }
        if self.non_finite:
            value["non_finite"] = self.non_finite
        if self.exceptions:
            value["exceptions"] = self.exceptions.to_json()
        return value

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> FoldedTensor:
        exceptions = value.get("exceptions")
        return cls(
            name=name,
            file=str(value["file"]),
            family=str(value["family"]),
            pattern=str(value["pattern"]),
            fold=Fold(
                norm=value["norm"],
                offset=float(value["offset"]),
                add_dtype=value["add_dtype"],
                mul_dtype=value["mul_dtype"],
            ),
            shape=tuple(int(extent) for extent in value["shape"]),
            dtype=str(value["dtype"]),
            sha256=str(value["sha256"]),
            non_finite=int(value.get("non_finite", 0)),
            exceptions=Exceptions.from_json(exceptions) if exceptions else None,
        )


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the source. `header` is the original safetensors header of a rewritten file."""

    name: str
    size: int
    sha256: str | None = None
    header: str | None = None

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"size": self.size}
        if self.sha256 is not None:
            value["sha256"] = self.sha256
        if self.header is not None:
            value["header"] = self.header
        return value

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> SourceFile:
        sha256, header = value.get("sha256"), value.get("header")
        return cls(
            name=name,
            size=int(value["size"]),
            sha256=None if sha256 is None else str(sha256),
            header=None if header is None else str(header),
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parsed `gemma_fold.json`."""

    origin: Origin
    model_type: str
    tensor_lock: bool
    config: str
    index: str | None
    index_name: str | None
    files: Mapping[str, SourceFile]
    directories: tuple[str, ...]
    tensors: Mapping[str, FoldedTensor]
    version: str = __version__

    def to_bytes(self) -> bytes:
        """The JSON text, one line per tensor and file so that it can be read and compared."""
        head = {
            "format": FORMAT,
            "version": self.version,
            "source": {
                "name": self.origin.name,
                "repo_id": self.origin.repo_id,
                "commit": self.origin.commit,
            },
            "model_type": self.model_type,
            "tensor_lock": self.tensor_lock,
            "config": self.config,
            "index_name": self.index_name,
            "index": self.index,
            "directories": list(self.directories),
        }
        lines = [f"  {_dump(key)}: {_dump(value)}" for key, value in head.items()]
        lines.append(_block("files", {n: f.to_json() for n, f in self.files.items()}))
        lines.append(_block("tensors", {n: t.to_json() for n, t in self.tensors.items()}))
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _block(key: str, entries: Mapping[str, Any]) -> str:
    body = ",\n".join(f"    {_dump(name)}: {_dump(value)}" for name, value in entries.items())
    return f"  {_dump(key)}: {{\n{body}\n  }}"


def read_manifest(folder: Path) -> Manifest:
    """Read `gemma_fold.json` of a folded checkpoint.

    Raises CheckpointError where there is none, where a later format was written, or where it is
    damaged.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MANIFEST}, so it is not a folded checkpoint; "
            "make one with `gemma-fold convert`"
        ) from None
    value = parse_json_object(raw, path)
    check_format(value.get("format"), path)
    try:
        _check_names([*value["files"], *value["directories"]], path)
        source = value["source"]
        return Manifest(
            origin=Origin(str(source["name"]), source["repo_id"], source["commit"]),
            model_type=str(value["model_type"]),
            tensor_lock=bool(value["tensor_lock"]),
            config=str(value["config"]),
            index=value["index"],
            index_name=value["index_name"],
            files={n: SourceFile.from_json(n, f) for n, f in value["files"].items()},
            directories=tuple(map(str, value["directories"])),
            tensors={n: FoldedTensor.from_json(n, t) for n, t in value["tensors"].items()},
            version=str(value["version"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); fold the original again"
        ) from error


def _check_names(names: list[str], where: Path) -> None:
    """A manifest from elsewhere must not make `unfold` write outside its folder."""
    for name in names:
        parts = name.split("/")
        if not name or name.startswith("/") or ".." in parts or "\\" in name:
            raise CheckpointError(
                f"{where} points outside the folder, to {name!r}; do not trust this checkpoint"
            )


def check_format(found: object, where: Path) -> None:
    """CheckpointError unless `found` is the format number this version reads."""
    if found == FORMAT:
        return
    if isinstance(found, int) and found > FORMAT:
        raise CheckpointError(
            f"{where} is format {found}, written by a later gemma-fold; "
            f"this is {__version__}, which reads format {FORMAT}: upgrade gemma-fold"
        )
    raise CheckpointError(f"{where} names no format this version knows; fold the original again")


def folded_config(
    base: Mapping[str, Any], *, dtype: str | None, tensors: int, tensor_lock: bool
) -> bytes:
    """`config.json` of a folded checkpoint: the config lock around the original config.

    `dtype` is torch's name for the dtype of the weights, written at the top so that no engine
    infers float32 from the gammas.
    """
    architectures = base.get("architectures") or []
    config = {
        "architectures": [ARCHITECTURE_PREFIX + str(name) for name in architectures],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        MODEL_TYPE: {
            "format": FORMAT,
            "norms": "gamma",
            "tensors": tensors,
            "tensor_lock": tensor_lock,
            "version": __version__,
        },
        "base_config": base,
    }
    if dtype is None:
        del config["dtype"]
    return (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()


def base_config(folder: Path) -> dict[str, Any]:
    """The original config inside a folded checkpoint's `config.json`; CheckpointError if none."""
    path = folder / CONFIG
    try:
        config = parse_json_object(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if config.get("model_type") != MODEL_TYPE or not isinstance(config.get(MODEL_TYPE), dict):
        raise CheckpointError(f"{path} does not carry the gemma_fold config; it was replaced")
    return unwrap_config(config, path)


def unwrap_config(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The original config inside a parsed folded one; CheckpointError names `where`."""
    block, base = config.get(MODEL_TYPE), config.get("base_config")
    check_format(block.get("format") if isinstance(block, dict) else None, where)
    if not isinstance(base, dict):
        raise CheckpointError(f"{where} has lost its base_config; fold the original again")
    if "quantization_config" in config:  # by a tool that rewrites weight files one by one
        raise CheckpointError(
            f"{where} has a quantization_config beside base_config, so its weights were quantized "
            "after folding; quantize the original, then fold that"
        )
    return base
