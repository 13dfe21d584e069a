"""Open a checkpoint folder: find its weight files, check that they agree, list everything else.

Nothing is ever written through these paths, and weights are never unpickled: only safetensors
headers, `config.json` and the index are read.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_fold.checkpoint.fields import parse_json_object as parse_json_object
from gemma_fold.checkpoint.header import Header, TensorEntry, read_header
from gemma_fold.checkpoint.names import check_top_name, shown, unsafe_reason
from gemma_fold.checkpoint.regular import open_regular, read_range
from gemma_fold.errors import CheckpointError

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
#: Bookkeeping of version control and of downloads: true of the source folder only.
SKIPPED_DIRECTORIES = frozenset({".git", ".cache"})
_MOST_FILES = 20_000  # links to folders may lead to any number of them
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_SNAPSHOT = re.compile(r"models--(?P<id>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


@dataclass(frozen=True, slots=True)
class FileState:
    """What must not change while a file is being read, nor before it is removed.

    An edit can keep size and mtime, but not ctime.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file at the top of the folder."""

    name: str
    path: Path
    header: Header
    state: FileState


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint came from: a folder, or a Hub repository at a commit."""

    name: str
    repo_id: str | None = None
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A readable checkpoint: every header parsed, index and headers in agreement."""

    root: Path
    origin: Origin
    config: Mapping[str, Any]
    config_raw: bytes
    index_name: str | None
    index_raw: bytes | None
    weights: tuple[WeightFile, ...]
    #: Relative path -> state of every file that is neither weights, config nor index.
    others: Mapping[str, FileState]
    directories: tuple[str, ...]
    skipped: tuple[str, ...]
    #: sha256 of files that the Hub told, for those that are not in its cache.
    sha256: Mapping[str, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, tuple[WeightFile, TensorEntry]]:
        """Every tensor by name, with the file that holds it."""
        return {t.name: (file, t) for file in self.weights for t in file.header.tensors.values()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by name."""
        return {t.name: t.shape for file in self.weights for t in file.header.tensors.values()}

    def paths(self) -> list[Path]:
        """Every file and folder of the checkpoint, as it is reached; some may be links."""
        names = [CONFIG, *([self.index_name] if self.index_name else [])]
        names += [file.name for file in self.weights]
        names += [*self.others, *self.directories, *self.skipped]
        return [self.root / name for name in names]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        weights = sum(file.state.size for file in self.weights)
        texts = len(self.config_raw) + len(self.index_raw or b"")
        return weights + texts + sum(state.size for state in self.others.values())


def open_checkpoint(path: str | os.PathLike[str], origin: Origin | None = None) -> Checkpoint:
    """Read config, index and headers of the folder `path`.

    Raises:
        CheckpointError: it is not a complete, consistent safetensors checkpoint.
    """
    root = Path(path)
    _check_is_model_folder(root)
    config_raw = read_small(root / CONFIG)
    config = check_config(parse_json_object(config_raw, root / CONFIG), root / CONFIG)
    others, directories, skipped = _walk(root)
    top = {name for name in others if "/" not in name}
    index_name = _find_index(root, top)
    index_raw = read_small(root / index_name) if index_name else None
    mapped = (
        index_map(index_raw, root / index_name) if index_raw is not None and index_name else None
    )
    names = _weight_names(root, top, mapped)
    weights = tuple(_open_weight_file(root, name) for name in names)
    _check_agreement(weights, mapped, index_name)
    for name in (CONFIG, index_name, *names):
        others.pop(name or "", None)
    return Checkpoint(
        root=root,
        origin=origin or _origin_of(root),
        config=config,
        config_raw=config_raw,
        index_name=index_name,
        index_raw=index_raw,
        weights=weights,
        others=others,
        directories=directories,
        skipped=skipped,
    )


def read_tensor(file: WeightFile, name: str) -> bytes:
    """The stored bytes of one tensor."""
    entry = file.header.tensors[name]
    start = file.header.data_start
    return read_range(file.path, start + entry.start, start + entry.end)


def resized_index(checkpoint: Checkpoint, growth: int) -> bytes | None:
    """The weight index with `total_size` moved by `growth` bytes; None if there is no index."""
    if checkpoint.index_raw is None or checkpoint.index_name is None:
        return None
    index = parse_json_object(checkpoint.index_raw, checkpoint.index_name)
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int | float):
        metadata["total_size"] += growth
    return (json.dumps(index, ensure_ascii=False, indent=2) + "\n").encode()


def _origin_of(root: Path) -> Origin:
    resolved = root.absolute()
    match = _SNAPSHOT.search(resolved.as_posix())
    if match is None:
        # A name that is not UTF-8 must not get into the manifest, which is.
        return Origin(resolved.name.encode("utf-8", "backslashreplace").decode())
    repo_id = match["id"].replace("--", "/", 1)
    return Origin(repo_id, repo_id, match["commit"])


def _check_is_model_folder(root: Path) -> None:
    if root.is_file():
        if root.suffix == ".gguf":
            raise CheckpointError(
                f"{root} is a GGUF file, whose norms llama.cpp has folded already; "
                "give the original safetensors folder (gemma-fold check compares the two)"
            )
        raise CheckpointError(
            f"{root} is a file; give the folder that holds config.json and *.safetensors"
        )
    if not root.is_dir():
        raise CheckpointError(
            f"{root} does not exist; give a folder or a Hub id such as google/gemma-3-270m"
        )
    names = set(os.listdir(root))
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{root} is a PEFT adapter, not a model; merge it into its base model and fold that"
        )
    if CONFIG not in names:
        hint = "fold the model folder itself"
        if any(name.endswith(".gguf") for name in names):
            hint = "GGUF norms are folded already; give the original safetensors folder"
        raise CheckpointError(f"{root} has no config.json, so its model type is unknown; {hint}")


def check_config(config: dict[str, Any], where: Path | str) -> dict[str, Any]:
    """Return a config.json's content if `architectures`, which is rewritten, is a list of names."""
    names = config.get("architectures")
    if names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        return config
    raise CheckpointError(
        f"invalid architectures in {where}: expected a list of names, got {shown(names)}; "
        "fetch the file again"
    )


def read_small(path: Path, limit: int = 256 << 20) -> bytes:
    """The content of a text file.

    Raises:
        CheckpointError: it is absent, no regular file, or longer than a text.
        HostError: the system does not let us read it.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise CheckpointError(f"{path} is too large to be a text file; fetch it again")
        return file.read(limit)


def _walk(root: Path) -> tuple[dict[str, FileState], tuple[str, ...], tuple[str, ...]]:
    """All files below `root` by relative path, its folders, and what was left out."""
    files: dict[str, FileState] = {}
    directories: list[str] = []
    skipped: list[str] = []
    scanned = _scan(root, "", frozenset({os.path.realpath(root)}))
    for number, (relative, status) in enumerate(scanned):
        if number == _MOST_FILES:
            raise CheckpointError(
                f"{root} holds more than {_MOST_FILES} files, counting what its links lead to; "
                "remove what does not belong to the model"
            )
        if relative.split("/")[-1] in SKIPPED_DIRECTORIES and stat.S_ISDIR(status.st_mode):
            skipped.append(relative + "/")
        elif stat.S_ISDIR(status.st_mode):
            directories.append(relative)
        elif stat.S_ISREG(status.st_mode):
            files[relative] = FileState.of(status)
        else:
            raise CheckpointError(
                f"{root / relative} is neither a file nor a folder; move it out of the checkpoint"
            )
    return files, tuple(directories), tuple(skipped)


def _scan(root: Path, inside: str, above: frozenset[str]) -> Iterator[tuple[str, os.stat_result]]:
    try:
        entries = sorted(os.scandir(root / inside), key=lambda item: item.name)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {root / inside}: {error.strerror}; check the folder's permissions"
        ) from error
    for entry in entries:
        relative = f"{inside}/{entry.name}" if inside else entry.name
        reason = unsafe_reason(relative)
        if reason is not None:
            raise CheckpointError(
                f"{root} holds {shown(relative)}, a name that cannot be written everywhere "
                f"({reason}); rename it, or move it out of the checkpoint"
            )
        try:
            status = entry.stat()
        except OSError as error:
            raise CheckpointError(
                f"cannot read {root / relative}: {error.strerror}; restore it or remove the link"
            ) from error
        yield relative, status
        if stat.S_ISDIR(status.st_mode) and entry.name not in SKIPPED_DIRECTORIES:
            real = os.path.realpath(entry.path)
            if real in above:
                raise CheckpointError(
                    f"{root / relative} links back to a folder above it; remove the link"
                )
            yield from _scan(root, relative, above | {real})


def _find_index(root: Path, top: set[str]) -> str | None:
    found = sorted(name for name in top if name.endswith(INDEX_SUFFIX))
    preferred = SINGLE_FILE + ".index.json"
    if preferred in found or len(found) < 2:
        return preferred if preferred in found else next(iter(found), None)
    raise CheckpointError(
        f"{root} has several weight indexes ({', '.join(found)}); keep the one that counts"
    )


def index_map(raw: bytes, where: Path | str) -> dict[str, str]:
    """The `weight_map` of a weight index: which file at the top of the folder holds each tensor.

    Raises:
        CheckpointError: it has no such map; the message names `where`.
    """
    index = parse_json_object(raw, where)
    mapped = index.get("weight_map")
    if not isinstance(mapped, dict) or not all(isinstance(v, str) for v in mapped.values()):
        raise CheckpointError(f"{where} has no weight_map of tensor names to files; fetch it again")
    for shard in sorted(set(mapped.values())):
        check_top_name(shard, where)
    metadata = index.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise CheckpointError(
            f"invalid metadata in {where}: expected a map, got {shown(metadata)}; fetch it again"
        )
    size = (metadata or {}).get("total_size")
    if size is not None and not (type(size) in (int, float) and 0 <= size < 2**63):
        raise CheckpointError(
            f"invalid total_size in {where}: expected a number of bytes, got {shown(size)}; "
            "fetch it again"
        )
    return mapped


def _weight_names(root: Path, top: set[str], mapped: dict[str, str] | None) -> list[str]:
    present = sorted(name for name in top if name.endswith(".safetensors"))
    if mapped is not None:
        for shard in sorted(set(mapped.values()) - set(present)):
            raise CheckpointError(
                f"{root / shard} is missing, though the index names it; finish the download"
            )
        if SINGLE_FILE in present and SINGLE_FILE not in mapped.values():
            raise CheckpointError(
                f"{root} has both {SINGLE_FILE} and an index of other files, and loaders differ "
                "on which they read; remove the one that does not count"
            )
        return present
    if not present:
        pickled = next((name for name in sorted(top) if name.endswith(_PICKLED)), None)
        if pickled:
            raise CheckpointError(
                f"{root} has only pickled weights ({pickled}), which are never opened; "
                "convert them to safetensors first"
            )
        raise CheckpointError(f"{root} has no *.safetensors file; finish the download")
    parts = [name for name in present if re.search(r"-\d+-of-\d+\.safetensors$", name)]
    if SINGLE_FILE not in present and (len(present) > 1 or parts):
        raise CheckpointError(
            f"{root} has {len(present)} weight files but no {SINGLE_FILE}.index.json; "
            "finish the download"
        )
    return present


def _open_weight_file(root: Path, name: str) -> WeightFile:
    path = root / name
    try:
        state = FileState.of(path.stat())
        return WeightFile(name, path, read_header(path), state)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; check the file and its permissions"
        ) from error


def _check_agreement(
    weights: tuple[WeightFile, ...], mapped: dict[str, str] | None, index_name: str | None
) -> None:
    """Every tensor is in exactly one file, and the index agrees."""
    holder: dict[str, str] = {}
    for file in weights:
        for name in file.header.tensors:
            if name in holder:
                raise CheckpointError(
                    f"tensor {name} is in both {holder[name]} and {file.name}; "
                    "loaders differ on which they read: keep one"
                )
            holder[name] = file.name
    if mapped is None:
        return
    for name, shard in mapped.items():
        if holder.get(name) != shard:
            raise CheckpointError(
                f"by {index_name}, tensor {name} is in {shard}, but it is "
                f"{'in ' + holder[name] if name in holder else 'in no file'}; fetch both again"
            )
    indexed = set(mapped.values())
    for name, shard in holder.items():
        if shard in indexed and name not in mapped:
            raise CheckpointError(
                f"tensor {name} of {shard} is not in {index_name}; fetch both again"
            )
