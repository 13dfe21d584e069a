"""A small Hub on 127.0.0.1, for tests that drive the real huggingface_hub client.

It speaks what the client uses to look at a model and to download it: model info, the tree listing,
and `resolve`, which sends small files itself and redirects large ones to a storage host. Every
byte sent is counted by file, so that a test can prove what was not downloaded. And it takes what
is uploaded without Xet: new repositories, files over LFS, commits and pull requests.

    with HubServer() as hub:
        commit = hub.add("org/name", folder)
        hub.use(monkeypatch, tmp_path)             # this process, or:
        subprocess.run(..., env=hub.environment(tmp_path))
"""

import base64
import hashlib
import json
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LARGE = ".safetensors"  # these are stored as LFS files are: behind a redirect, named by sha256
PIECE = 2**16


@dataclass
class Model:
    """One model: a folder at one commit, under any number of revision names."""

    folder: Path
    commit: str
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None
    gated: bool = False
    private: bool = False

    def files(self) -> dict[str, Path]:
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}


@dataclass
class Faults:
    """What the server does wrong, for tests of the client's patience."""

    status: list[int] = field(default_factory=list)  # answers to the next file requests
    ignore_range: bool = False
    break_off: bool = False  # promise the whole answer, send half
    #: Asked before each GET of more than half a megabyte of a large file: whether to send half.
    breaks_large: Callable[[], bool] | None = None


class HubServer:
    """See the module's docstring. `sent` counts bytes by `org/name/path`."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.sent: Counter[str] = Counter()
        self.log: list[tuple[str, str, dict[str, str]]] = []  # method, URL, headers
        self.faults = Faults()
        self.uploads: Path | None = None
        self.writer: str | None = None  # the token that may write
        self.stored: dict[str, bytes] = {}  # what came over LFS, by sha256
        self.pull_requests: list[Model] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage = f"http://localhost:{self.port}"  # another host, as far as clients can tell

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, folder: Path, **options: Any) -> str:
        """Serve `folder` as `repo_id`; the commit that names its content."""
        digest = hashlib.sha1(repo_id.encode())
        for path in sorted(folder.rglob("*")):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        self.models[repo_id] = Model(folder, digest.hexdigest(), **options)
        return digest.hexdigest()

    def allow_uploads(self, folder: Path, token: str) -> None:
        """Take uploads from who has `token`, into folders below `folder`."""
        self.uploads, self.writer = folder, token

    def write(self, model: Model, name: str, content: bytes) -> None:
        """Put an uploaded file into a repository."""
        path = model.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that point another process here, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
        }

    def use(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Point this process here; the library reads its environment only when it is imported."""
        from huggingface_hub import constants

        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with self.hub.lock:
            self.hub.log.append((self.command, self.path, dict(self.headers)))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self.api("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "storage":
            self.stored(*parts[1:])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), parts[3:])
        else:
            self.refuse(404, "EntryNotFound")

    def model(self, repo_id: str) -> Model | None:
        model = self.hub.models.get(repo_id)
        if model is None:
            self.refuse(404, "RepoNotFound")
        elif model.token and self.headers.get("Authorization") != f"Bearer {model.token}":
            self.refuse(401, "GatedRepo" if model.gated else "RepoNotFound")
        else:
            return model
        return None

    def api(self, repo_id: str, rest: list[str]) -> None:
        model = self.model(repo_id)
        if model is None:
            return
        revision = unquote("/".join(rest[1:])) if rest else "main"
        if revision != model.commit and revision not in model.revisions:
            self.refuse(404, "RevisionNotFound")
        elif rest[:1] == ["tree"]:
            self.send_json([_described(name, path) for name, path in model.files().items()])
        else:
            siblings = [_sibling(name, path) for name, path in model.files().items()]
            info = {"id": repo_id, "sha": model.commit, "private": model.private}
            self.send_json(info | {"siblings": siblings})

    def do_PUT(self) -> None:
        content = self.body()
        if self.hub.faults.status:
            self.refuse(self.hub.faults.status.pop(0), "")
            return
        self.hub.stored[hashlib.sha256(content).hexdigest()] = content
        self.send_json({})

    def do_POST(self) -> None:
        content = self.body()
        with self.hub.lock:
            self.hub.log.append((self.command, self.path, dict(self.headers)))
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if url.path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {self.hub.writer}":
            self.refuse(401, "")
        elif url.path == "/api/repos/create":
            self.create(json.loads(content))
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            self.batch(json.loads(content)["objects"])
        elif parts[4:5] == ["preupload"]:
            self.preupload(json.loads(content)["files"])
        elif parts[4:5] == ["commit"]:
            self.commit("/".join(parts[2:4]), content, "create_pr=1" in url.query)
        else:
            self.refuse(404, "")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        if repo_id in self.hub.models:
            self.refuse(409, "")
            return
        folder = Path(tempfile.mkdtemp(prefix="hub-", dir=self.hub.uploads))
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.models[repo_id] = Model(folder, "0" * 40, private=private)
        self.send_json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def preupload(self, files: list[dict[str, Any]]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self.send_json({"files": modes})

    def batch(self, objects: list[dict[str, Any]]) -> None:
        answers = [
            {"oid": one["oid"], "size": one["size"]}
            | (
                {}
                if one["oid"] in self.hub.stored
                else {"actions": {"upload": {"href": f"{self.hub.storage}/put/{one['oid']}"}}}
            )
            for one in objects
        ]
        self.send_json({"transfer": "basic", "objects": answers})

    def commit(self, repo_id: str, content: bytes, as_pull_request: bool) -> None:
        model = self.hub.models[repo_id]
        if as_pull_request:
            folder = Path(tempfile.mkdtemp(prefix="pr-", dir=self.hub.uploads))
            model = Model(folder, "", revisions=(f"refs/pr/{len(self.hub.pull_requests) + 1}",))
            self.hub.pull_requests.append(model)
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.write(model, value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                self.hub.write(model, value["path"], self.hub.stored[value["oid"]])
        model.commit = hashlib.sha1(content).hexdigest()
        answer = {"success": True, "commitOid": model.commit}
        answer["commitUrl"] = f"{self.hub.url}/{repo_id}/commit/{model.commit}"
        if as_pull_request:
            number = len(self.hub.pull_requests)
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        self.send_json(answer)

    def resolve(self, repo_id: str, rest: list[str]) -> None:
        model = self.model(repo_id)
        if model is None:
            return
        revision, name = next(
            (("/".join(rest[:i]), "/".join(rest[i:])) for i in range(1, len(rest))
             if "/".join(rest[:i]) in (model.commit, *model.revisions)),
            ("", ""),
        )  # fmt: skip
        path = model.files().get(name)
        if not revision or path is None:
            self.refuse(404, "EntryNotFound" if revision else "RevisionNotFound")
        elif name.endswith(LARGE):
            self.send_response(302)
            self.send_header("Location", f"{self.hub.storage}/storage/{repo_id}/{name}")
            self.send_header("X-Repo-Commit", model.commit)
            self.send_header("X-Linked-Etag", f'"{sha256(path)}"')
            self.send_header("X-Linked-Size", str(path.stat().st_size))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            extra = {"X-Repo-Commit": model.commit, "ETag": f'"{_git_id(path)}"'}
            self.send_file(f"{repo_id}/{name}", path, extra)

    def stored(self, org: str, repo: str, *rest: str) -> None:
        name = "/".join(rest)
        path = self.hub.models[f"{org}/{repo}"].folder / name
        self.send_file(f"{org}/{repo}/{name}", path, {"ETag": f'"{sha256(path)}"'})

    def send_file(self, key: str, path: Path, extra: dict[str, str]) -> None:
        faults = self.hub.faults
        if self.command == "GET" and faults.status:
            self.refuse(faults.status.pop(0), "")
            return
        size = path.stat().st_size
        begin, end = 0, size
        asked = self.headers.get("Range")
        if asked and not faults.ignore_range:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(size, int(last) + 1) if last else size
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        else:
            self.send_response(200)
        for header, value in extra.items():
            self.send_header(header, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        large = end - begin > 2**19 and key.endswith(LARGE)
        if faults.break_off or (large and faults.breaks_large and faults.breaks_large()):
            end = begin + (end - begin) // 2
            self.close_connection = True
        self.send_range(key, path, begin, end)

    def send_range(self, key: str, path: Path, begin: int, end: int) -> None:
        with open(path, "rb") as file:
            file.seek(begin)
            while begin < end:
                data = file.read(min(PIECE, end - begin))
                try:
                    self.wfile.write(data)
                except OSError:  # the client has heard enough
                    self.close_connection = True
                    return
                with self.hub.lock:
                    self.hub.sent[key] += len(data)
                begin += len(data)

    def send_json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _described(name: str, path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    entry = {"type": "file", "path": name, "size": size, "oid": _git_id(path)}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": sha256(path), "size": size, "pointerSize": 130}
    return entry


def _sibling(name: str, path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    entry: dict[str, Any] = {"rfilename": name, "size": size}
    if name.endswith(LARGE):
        entry["lfs"] = {"sha256": sha256(path), "size": size, "pointerSize": 130}
    return entry


def _git_id(path: Path) -> str:
    return hashlib.sha1(path.name.encode() + str(path.stat().st_size).encode()).hexdigest()


def sha256(path: Path) -> str:
    """The content's sha256 in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(2**20):
            digest.update(data)
    return digest.hexdigest()
