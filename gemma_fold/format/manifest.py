"""`gemma_fold.json` and the folded `config.json`: what format 1 writes beside the weights.

The manifest holds whatever is needed to verify a folded checkpoint and to unfold it to the very
bytes it came from; `docs/format.md` describes every key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from blake3 import blake3

from gemma_fold._version import __version__
from gemma_fold.checkpoint.digest import digest_text
from gemma_fold.checkpoint.fields import Fields, parse_json_object
from gemma_fold.checkpoint.names import check_name, shown
from gemma_fold.checkpoint.source import CONFIG, Checkpoint, Origin, check_config, read_small
from gemma_fold.errors import CheckpointError
from gemma_fold.format.arithmetic import FOLDABLE_DTYPES, Exceptions
from gemma_fold.format.consistency import check_consistent
from gemma_fold.format.names import ARCHITECTURE_PREFIX, FORMAT, MANIFEST, MODEL_TYPE
from gemma_fold.rules import Fold
from gemma_fold.rules.model import NormName, Rounding

_OWN_DIGEST = b',\n  "blake3": "%s"\n}\n'


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
        blake3: of the original bytes.
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
    blake3: str
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
            "blake3": self.blake3,
        }
        if self.non_finite:
            value["non_finite"] = self.non_finite
        if self.exceptions:
            value["exceptions"] = self.exceptions.to_json()
        return value

    @classmethod
    def from_json(cls, name: str, value: Fields) -> FoldedTensor:
        """Inverse of `to_json`; CheckpointError names the first field that is wrong."""
        shape = value.integers("shape", 1)
        dtype = value.choice("dtype", tuple(FOLDABLE_DTYPES))
        exceptions = value.optional("exceptions", value.map)
        return cls(
            name=name,
            file=check_name(value.text("file"), value.where),
            family=value.text("family"),
            pattern=value.text("pattern"),
            fold=Fold(
                norm=cast(NormName, value.choice("norm", get_args(NormName))),
                offset=value.number("offset"),
                add_dtype=cast(Rounding, value.choice("add_dtype", get_args(Rounding))),
                mul_dtype=cast(Rounding, value.choice("mul_dtype", get_args(Rounding))),
            ),
            shape=shape,
            dtype=dtype,
            blake3=value.digest("blake3"),
            non_finite=value.integer("non_finite", shape[0], default=0),
            exceptions=None
            if exceptions is None
            else Exceptions.from_json(exceptions, shape[0], dtype),
        )


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the source.

    Attributes:
        name: relative to the folder.
        size: in bytes.
        sha256: of the whole file, where the Hub's cache knows it.
        blake3: of the whole file, where it was copied whole.
        header: the original safetensors header of a rewritten weight file.
        folded_header: BLAKE3 of the header it has since, with the 8 bytes before it.
        tensors: BLAKE3 of each tensor of a rewritten weight file that was not folded.
    """

    name: str
    size: int
    sha256: str | None = None
    blake3: str | None = None
    header: str | None = None
    folded_header: str | None = None
    tensors: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        value = {key: getattr(self, key) for key in self.__slots__ if key != "name"}
        return {key: found for key, found in value.items() if found is not None}

    @classmethod
    def from_json(cls, name: str, value: Fields) -> SourceFile:
        """Inverse of `to_json`; CheckpointError names the first field that is wrong."""
        return cls(
            name=check_name(name, value.where),
            size=value.integer("size"),
            sha256=value.optional("sha256", value.digest),
            blake3=value.optional("blake3", value.digest),
            header=value.optional("header", value.text),
            folded_header=value.optional("folded_header", value.digest),
            tensors=value.optional("tensors", value.digests),
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parsed `gemma_fold.json`.

    Attributes:
        origin: where the source came from.
        model_type: of the source.
        tensor_lock: whether gammas are [H, 1].
        config: the source's config.json, verbatim.
        index: its weight index, verbatim.
        index_name: that file's name.
        files: every file of the source.
        directories: its folders.
        tensors: every tensor that was folded.
        made_by: what wrote the folder: `CONVERTED` can be made again from its source.
        written: BLAKE3 of the texts that were made anew, config.json and the weight index, by name.
        version: of the gemma-fold that wrote it.
        intact: whether the text is what was written, by its own digest; None if it has none.
    """

    origin: Origin
    model_type: str
    tensor_lock: bool
    config: str
    index: str | None
    index_name: str | None
    files: Mapping[str, SourceFile]
    directories: tuple[str, ...]
    tensors: Mapping[str, FoldedTensor]
    made_by: str = ""
    written: Mapping[str, str] = field(default_factory=dict)
    version: str = __version__
    intact: bool | None = field(default=None, compare=False)

    @property
    def has_digests(self) -> bool:
        """Whether every byte of the source's weight files is known by a digest."""
        return all(
            file.tensors is not None if file.header is not None else file.blake3 is not None
            for name, file in self.files.items()
            if name.endswith(".safetensors")
        )

    def to_bytes(self) -> bytes:
        """The JSON text, one line per tensor and file so that it can be read and compared."""
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """The text piece by piece: a large model's is some hundred megabytes."""
        digest = blake3()
        for line in self._lines():
            raw = line.encode()
            digest.update(raw)
            yield raw
        yield _OWN_DIGEST % digest.hexdigest().encode()

    def _lines(self) -> Iterator[str]:
        head = {
            "format": FORMAT,
            "version": self.version,
            "source": {
                "name": self.origin.name,
                "repo_id": self.origin.repo_id,
                "commit": self.origin.commit,
            },
            "made_by": self.made_by,
            "model_type": self.model_type,
            "tensor_lock": self.tensor_lock,
            "config": self.config,
            "index_name": self.index_name,
            "index": self.index,
            "directories": list(self.directories),
            "written": dict(self.written),
        }
        before = "{\n"
        for key, value in head.items():
            yield f"{before}  {_dump(key)}: {_dump(value)}"
            before = ",\n"
        yield from _block("files", self.files)
        yield from _block("tensors", self.tensors)


def manifest_of(
    checkpoint: Checkpoint,
    texts: tuple[bytes, bytes | None],
    written: tuple[bytes, bytes | None],
    files: Mapping[str, SourceFile],
    **fields: Any,
) -> Manifest:
    """The manifest of a folded checkpoint that is made of `checkpoint`.

    Args:
        checkpoint: its source, or what was saved in its place.
        texts: config.json and weight index of the source.
        written: those of the folded checkpoint.
        files: every other file of the source.
        **fields: the rest of :class:`Manifest`.
    """
    names = (CONFIG, checkpoint.index_name)
    before, after = (
        {name: raw for name, raw in zip(names, pair, strict=True) if name and raw is not None}
        for pair in (texts, written)
    )
    known = {n: SourceFile(n, len(raw), blake3=digest_text(raw)) for n, raw in before.items()}
    return Manifest(
        config=texts[0].decode(),
        index=None if texts[1] is None else texts[1].decode(),
        index_name=checkpoint.index_name,
        files={**known, **files},
        directories=checkpoint.directories,
        written={name: digest_text(raw) for name, raw in after.items()},
        **fields,
    )


def _is_intact(raw: bytes) -> bool | None:
    """Whether a manifest's own digest, its last line, is that of the bytes before it."""
    body = raw[: -len(_OWN_DIGEST % (b"0" * 64))]
    expected = body + _OWN_DIGEST % digest_text(body).encode()
    if b'"blake3"' not in raw[len(body) :]:
        return None
    return raw == expected


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _block(key: str, entries: Mapping[str, FoldedTensor | SourceFile]) -> Iterator[str]:
    yield f",\n  {_dump(key)}: {{\n"
    before = ""
    for name, entry in entries.items():
        yield f"{before}    {_dump(name)}: {_dump(entry.to_json())}"
        before = ",\n"
    yield "\n  }"


def read_manifest(folder: Path) -> Manifest:
    """Read `gemma_fold.json` of a folded checkpoint.

    Raises:
        CheckpointError: there is none, it has a later format, or it is damaged.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{folder} has no {MANIFEST}, so it is not a folded checkpoint; "
            "make one with `gemma-fold convert`"
        )
    return parse_manifest(read_small(path), path)


def parse_manifest(raw: bytes, where: Path | str) -> Manifest:
    """Parse the bytes of a `gemma_fold.json`; every value has its type, and they fit together.

    Raises:
        CheckpointError: a field is wrong; the message names the first.
    """
    document = parse_json_object(raw, where)
    check_format(document.get("format"), where)
    value = Fields(document, where)
    source = value.map("source")
    manifest = Manifest(
        origin=Origin(
            source.text("name"),
            source.optional("repo_id", source.text),
            source.optional("commit", source.text),
        ),
        model_type=value.text("model_type"),
        tensor_lock=value.flag("tensor_lock"),
        config=value.text("config"),
        index=value.optional("index", value.text),
        index_name=value.optional("index_name", value.text),
        files={n: SourceFile.from_json(n, f) for n, f in value.map("files").items("file")},
        directories=tuple(check_name(name, where) for name in value.texts("directories")),
        tensors={n: FoldedTensor.from_json(n, t) for n, t in value.map("tensors").items("tensor")},
        made_by=value.optional("made_by", value.text) or "",
        written=value.optional("written", value.digests) or {},
        version=value.text("version"),
        intact=_is_intact(raw),
    )
    check_consistent(manifest, where)
    return manifest


def check_format(found: object, where: Path | str) -> None:
    """CheckpointError unless `found` is the format number this version reads."""
    number = found if type(found) is int else 0  # by exact type, since True equals 1
    if number == FORMAT:
        return
    if number > FORMAT:
        raise CheckpointError(
            f"{where} is format {shown(number)}, written by a later gemma-fold; "
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
    config = parse_json_object(read_small(path), path)
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
    return check_config(base, f"base_config of {where}")
