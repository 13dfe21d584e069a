"""Models on the Hugging Face Hub: headers without the weights, and whole downloads.

Where to look and who is asking come from huggingface_hub's own settings: HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE, HF_HOME, HF_HUB_CACHE. The library, and whatever else costs start-up time, is
imported only when a Hub id is used.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gemma_fold.checkpoint.header import Header, header_length, parse_header
from gemma_fold.checkpoint.names import check_name, shown
from gemma_fold.checkpoint.regular import read_range
from gemma_fold.checkpoint.source import CONFIG, INDEX_SUFFIX, open_checkpoint, parse_json_object
from gemma_fold.errors import CheckpointError, GemmaFoldError, HostError, UsageError, first_line

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^\s@]+))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_FIRST_READ = 2**17  # bytes; holds nearly every header, so that one request per file is enough
_MAX_JSON = 2**28  # bytes
_PIECE = 2**20  # bytes
_TIMEOUT = 30.0  # seconds without an answer
_THREADS = 8

_NOT_NEEDED = (
    "pytorch_model*.bin",
    "*.pth",
    "*.pt",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.tflite",
    "onnx/*",
    "openvino/*",
    "coreml/*",
    "original/*",
    "optimizer*",
    "runs/*",
    "*.tfevents*",
)
"""The same weights in other formats, which would double a download, and what training leaves."""


@dataclass(frozen=True, slots=True)
class RemoteCheckpoint:
    """A model on the Hub, by its headers.

    Attributes:
        repo_id: `org/name`.
        commit: the commit that the revision named when it was asked for.
        config: config.json.
        index: the weight index, or None when there is none.
        headers: by file name, for every safetensors file at the top of the repository.
        files: every file's size in bytes by its path in the repository.
        folder: the snapshot in the cache, where HF_HUB_OFFLINE lets only the cache answer.
        sha256: of the large files, as the Hub has it.
    """

    repo_id: str
    commit: str
    config: Mapping[str, Any]
    index: Mapping[str, Any] | None
    headers: Mapping[str, Header]
    files: Mapping[str, int]
    folder: Path | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    def needed(self) -> list[str]:
        """The files that `download` would bring."""
        return [n for n in self.files if not any(fnmatch(n, p) for p in _NOT_NEEDED)]


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` is to be looked up on the Hub; anything that exists here is not."""
    return _HUB_ID.fullmatch(text) is not None and not os.path.lexists(text)


def parse_hub_id(text: str) -> tuple[str, str | None]:
    """Split `org/name[@revision]` into `org/name` and the revision.

    Raises:
        UsageError: the text is not such an id.
    """
    match = _HUB_ID.fullmatch(text)
    if match is None:
        raise _not_an_id(text)
    return match["repo"], match["revision"]


def _not_an_id(text: str) -> UsageError:
    return UsageError(f"{text!r} is not a Hub id; write org/name or org/name@revision")


def fetch_headers(repo_id: str, revision: str | None = None) -> RemoteCheckpoint:
    """Read config, index and safetensors headers by range requests; no weights are downloaded.

    With HF_HUB_OFFLINE, the same of a model that is in the Hub cache.

    Raises:
        CheckpointError: no such model or revision, or its files are damaged or incomplete.
        HostError: the Hub cannot be reached, does not let us in, or is not to be asked.
    """
    if _is_offline():
        return _cached_headers(repo_id, revision)
    with _explained(repo_id, revision):
        from concurrent.futures import ThreadPoolExecutor

        from huggingface_hub import HfApi

        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        files = {
            check_name(file.rfilename, repo_id): _file_size(file.size, file.rfilename, repo_id)
            for file in info.siblings or ()
        }
        remote = _Remote(repo_id, info.sha or "", files)
        config = remote.json(CONFIG)
        index_name = remote.index_name()
        index = remote.json(index_name) if index_name else None
        names = sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)
        with ThreadPoolExecutor(_THREADS) as pool:
            headers = dict(zip(names, pool.map(remote.header, names), strict=True))
    known = {file.rfilename: getattr(file.lfs, "sha256", None) for file in info.siblings or ()}
    sha256 = {name: text for name, text in known.items() if text and _SHA256.fullmatch(text)}
    result = RemoteCheckpoint(repo_id, remote.commit, config, index, headers, files, sha256=sha256)
    _check_complete(result)
    return result


def open_ranges(checkpoint: RemoteCheckpoint) -> Callable[[str, int, int], bytes]:
    """What returns the bytes [begin, end) of a file of `checkpoint`, by one request each.

    It raises HostError where the Hub cannot be reached.
    """
    if checkpoint.folder is not None:
        folder = checkpoint.folder
        return lambda name, begin, end: read_range(folder / name, begin, end)
    remote = _Remote(checkpoint.repo_id, checkpoint.commit, checkpoint.files)

    def read(name: str, begin: int, end: int) -> bytes:
        with _explained(checkpoint.repo_id, checkpoint.commit):
            return remote.read(name, begin, end)

    return read


def open_stream(checkpoint: RemoteCheckpoint) -> Callable[[str, int, int], Iterator[bytes]]:
    """What sends the bytes [begin, end) of a file of `checkpoint` piece by piece, by one request.

    It raises HostError if the Hub cannot be reached, or no more comes.
    """
    remote = _Remote(checkpoint.repo_id, checkpoint.commit, checkpoint.files)

    def stream(name: str, begin: int, end: int) -> Iterator[bytes]:
        with _explained(checkpoint.repo_id, checkpoint.commit):
            yield from remote.stream(name, begin, end)

    return stream


def download(repo_id: str, revision: str | None = None) -> tuple[Path, str]:
    """Download a model into the Hub cache, or find it there.

    Weights in formats other than safetensors are left out. All files are of one commit, even if
    the repository moves on during the download.

    Returns:
        The snapshot folder, and the commit it holds. The folder is shared and read-only by
        convention: its files are links that must never be written through.

    Raises:
        CheckpointError: no such model or revision.
        HostError: the Hub cannot be reached and the model is not in the cache, or the
            cache cannot be written.
    """
    with _explained(repo_id, revision):
        from huggingface_hub import snapshot_download

        path = snapshot_download(repo_id, revision=revision, ignore_patterns=list(_NOT_NEEDED))
    return Path(path), Path(path).name


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A commit: `url` is that of the pull request, if one was opened."""

    url: str
    commit: str
    pull_request: str | None


def prepare_repo(repo_id: str, *, private: bool, create_pr: bool, marker: str) -> list[str]:
    """Make the repository, or see that nothing in the one there is would be lost; warnings.

    Raises:
        UsageError: the repository holds another model: weights without the file `marker`.
        HostError: the Hub cannot be reached, or does not let us in.
    """
    with _explained(repo_id, None):
        from huggingface_hub import HfApi, get_token

        if get_token() is None:
            raise HostError("push needs a token that may write; `hf auth login`, or set HF_TOKEN")
        api = HfApi()
        if not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            return []
        info = api.model_info(repo_id, timeout=_TIMEOUT)
    names = {file.rfilename for file in info.siblings or ()}
    if any(name.endswith(".safetensors") for name in names) and marker not in names:
        if not create_pr:
            raise UsageError(
                f"{repo_id} holds another model; name a new repository, or propose it there with "
                "--create-pr"
            )
        return [f"{repo_id} holds another model, which the pull request would replace"]
    if private and not info.private:
        return [f"{repo_id} was there and stays public"]
    return []


def upload(repo_id: str, folder: Path, message: str, *, create_pr: bool) -> Uploaded:
    """Upload all that is in a folder; what of it is there already is not sent again.

    Raises:
        HostError: the Hub cannot be reached, or does not let us in.
    """
    with _explained(repo_id, None):
        from huggingface_hub import HfApi

        made = HfApi().upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, create_pr=create_pr
        )
    return Uploaded(made.pr_url or made.commit_url, made.oid, made.pr_revision)


def cached_sha256(path: Path) -> str | None:
    """The sha256 of a file's content if the Hub cache already knows it, else None.

    The cache names the blob of a large file by the sha256 that the Hub gave, and does not hash it
    again; `path` is the snapshot's link to it. Only that first link counts: the blob itself may be
    a link into a store shared by all repositories, where names are another hash of the same length.
    """
    if not path.is_symlink():
        return None
    blob = path.parent / os.readlink(path)
    is_blob = blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) is not None
    return blob.name if is_blob else None


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _cached_headers(repo_id: str, revision: str | None) -> RemoteCheckpoint:
    folder, commit = download(repo_id, revision)  # which only looks into the cache now
    found = open_checkpoint(folder)
    index = parse_json_object(found.index_raw, INDEX_SUFFIX) if found.index_raw else None
    files = [path.relative_to(folder).as_posix() for path in found.paths() if path.is_file()]
    sizes = {name: (folder / name).stat().st_size for name in files}
    headers = {file.name: file.header for file in found.weights}
    return RemoteCheckpoint(repo_id, commit, found.config, index, headers, sizes, folder)


@dataclass(frozen=True, slots=True)
class _Remote:
    repo_id: str
    commit: str
    files: Mapping[str, int]

    def where(self, name: str) -> str:
        return f"{self.repo_id}@{self.commit[:12]}/{name}"

    def index_name(self) -> str | None:
        preferred = "model" + INDEX_SUFFIX
        found = sorted(n for n in self.files if n.endswith(INDEX_SUFFIX) and "/" not in n)
        return preferred if preferred in found else next(iter(found), None)

    def json(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            raise CheckpointError(
                f"{self.repo_id} has no {name}; give a model in the transformers layout"
            )
        if self.files[name] > _MAX_JSON:
            raise CheckpointError(f"{self.where(name)} is too large for a text file")
        return parse_json_object(self.read(name, 0, self.files[name]), self.where(name))

    def header(self, name: str) -> Header:
        size, where = self.files[name], self.where(name)
        start = self.read(name, 0, min(size, _FIRST_READ))
        length = header_length(start[:8], size, where)
        raw = start[8 : 8 + length]
        if len(raw) < length:
            raw += self.read(name, 8 + len(raw), 8 + length)
        return parse_header(raw, data_size=size - 8 - length, where=where)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file."""
        return b"".join(self.stream(name, begin, end))

    def stream(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The same as it comes; a server that ignores the range would otherwise send all of it."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        if begin == end:
            return
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={begin}-{end - 1}",
            "Accept-Encoding": "identity",
        }
        url = hf_hub_url(self.repo_id, name, revision=self.commit)
        with http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT) as response:
            hf_raise_for_status(response)
            complete = (begin, end) == (0, self.files[name])
            if response.status_code != 206 and not complete:
                raise HostError(
                    f"{self.where(name)}: the server does not send parts of files; "
                    "download the model and give its folder"
                )
            got = 0
            with _broken_off(self.where(name)):
                for piece in response.iter_bytes(_PIECE):
                    got += len(piece)
                    if got <= end - begin:
                        yield piece
            if got != end - begin:
                raise HostError(
                    f"{self.where(name)}: asked for {end - begin} bytes, got {got}; try again"
                )


def _file_size(size: Any, name: str, repo_id: str) -> int:
    if size is None:
        return 0
    if type(size) is not int or size < 0:
        raise CheckpointError(
            f"invalid size of {shown(name)} in {repo_id}: expected a number of bytes, got "
            f"{shown(size)}; check HF_ENDPOINT"
        )
    return size


def _check_complete(remote: RemoteCheckpoint) -> None:
    if not remote.headers:
        raise CheckpointError(
            f"{remote.repo_id} has no *.safetensors file; convert its weights to safetensors first"
        )
    weight_map = {} if remote.index is None else remote.index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{remote.repo_id}: the weight index has no weight_map; report it to its author"
        )
    for name, file in weight_map.items():
        known = isinstance(file, str) and file in remote.headers
        if not known or name not in remote.headers[file].tensors:
            raise CheckpointError(
                f"{remote.repo_id}: the weight index places tensor {name} in {file!r}, "
                "but it is not there; report it to its author"
            )


@contextmanager
def _broken_off(where: str) -> Iterator[None]:
    # Inside the library's retrying context a network error must not get out as it is: the context
    # would start over in the middle of our block.
    try:
        yield
    except Exception as error:
        if not _is_network_error(error):
            raise
        raise HostError(
            f"{where}: the connection broke off ({first_line(error)}); try again"
        ) from None


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the library's errors into one line each."""
    try:
        yield
    except GemmaFoldError:
        raise
    except Exception as error:
        explanation = _explain(error, repo_id, revision)
        if explanation is None:
            raise
        raise explanation from error


def _explain(error: Exception, repo_id: str, revision: str | None) -> GemmaFoldError | None:
    from huggingface_hub import constants, errors

    place = constants.ENDPOINT
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    reason = first_line(cause or error)
    explained: dict[type[Exception], GemmaFoldError] = {
        errors.HFValidationError: _not_an_id(repo_id),
        errors.GatedRepoError: HostError(
            f"{repo_id} is gated; accept its terms at {place}/{repo_id}, then `hf auth login`"
        ),
        errors.RevisionNotFoundError: CheckpointError(
            f"{repo_id} has no revision {revision!r}; name a branch, a tag or a full commit"
        ),
        errors.RepositoryNotFoundError: CheckpointError(
            f"{repo_id} is neither a folder here nor a model on {place} that you may read; "
            "check the spelling, or `hf auth login` if it is private"
        ),
        errors.OfflineModeIsEnabled: HostError(
            f"{repo_id} is not in the cache and HF_HUB_OFFLINE is set; unset it, or give a folder"
        ),
        errors.HfHubHTTPError: HostError(
            f"{place} refused {repo_id} ({reason}); check the token, or try later"
        ),
    }
    for kind, explanation in explained.items():
        if isinstance(cause, kind):
            return explanation
    if cause is None or _is_network_error(cause):
        return HostError(
            f"{place} cannot be reached for {repo_id} ({reason}); "
            "check the connection and HF_ENDPOINT, or give a folder"
        )
    if isinstance(cause, ValueError) and "filename" in str(cause):
        # The library refuses to write outside of its cache before anything of that file is fetched.
        return CheckpointError(
            f"{repo_id} points outside the folder: {reason} Do not trust this checkpoint"
        )
    if isinstance(cause, OSError):
        return _explain_disk(cause, constants.HF_HUB_CACHE)
    return None


def _explain_disk(error: OSError, cache: str) -> HostError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space, or set HF_HUB_CACHE to another disk"
    else:
        advice = "check its permissions, or set HF_HUB_CACHE to a folder you may write"
    return HostError(f"the Hub cache {cache} cannot be used ({first_line(error)}); {advice}")


def _is_network_error(error: BaseException) -> bool:
    # By module, since the library has changed its HTTP client more than once.
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
