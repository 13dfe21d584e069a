"""The real huggingface_hub client against a Hub on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hubserver import HubServer, Model, _Handler, sha256
from huggingface_hub import close_session, constants
from safetensors.numpy import save_file

from gemma_fold import DiffOptions, diff, inspect
from gemma_fold.checkpoint import hub as hub_module
from gemma_fold.checkpoint.header import TensorEntry, read_header, render_header
from gemma_fold.checkpoint.hub import (
    cached_sha256,
    download,
    fetch_headers,
    looks_like_hub_id,
    open_ranges,
    parse_hub_id,
)
from gemma_fold.errors import CheckpointError, GemmaFoldError, HostError, UsageError

CONFIG = {"model_type": "gemma3_text"}
MIB = 2**20
Action = Callable[..., object]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home")
        yield server
        close_session()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards of a few MiB, an index, a file in a folder, and weights in another format."""
    folder = tmp_path / "model"
    (folder / "extra").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "extra" / "notes.txt").write_text("notes")
    (folder / "pytorch_model.bin").write_bytes(bytes(MIB))
    weight_map: dict[str, str] = {}
    for shard in (1, 2):
        name = f"model-{shard:05}-of-00002.safetensors"
        tensors = {f"layers.{shard}.{i}.weight": np.ones((512, 512), np.float32) for i in range(3)}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 6 * MIB}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def message(error: pytest.ExceptionInfo[GemmaFoldError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Ids


@pytest.mark.parametrize(
    ("text", "repo_id", "revision"),
    [
        ("google/gemma-3-270m", "google/gemma-3-270m", None),
        ("google/gemma-3-270m@main", "google/gemma-3-270m", "main"),
        ("a/b@refs/pr/3", "a/b", "refs/pr/3"),
        ("_a/b_.c@0123456789abcdef", "_a/b_.c", "0123456789abcdef"),
    ],
)
def test_hub_ids(text: str, repo_id: str, revision: str | None) -> None:
    assert looks_like_hub_id(text)
    assert parse_hub_id(text) == (repo_id, revision)


@pytest.mark.parametrize(
    "text",
    ["", "name", "./org/name", "/org/name", "../name", "org/name/", "a/b/c", "a/b@", "a//b",
     "-a/b", "a/b.", "a/b c", "~/name", "https://huggingface.co/a/b", "@a/b", "a/b@c d"],
)  # fmt: skip
def test_what_is_no_hub_id(text: str) -> None:
    assert not looks_like_hub_id(text)
    with pytest.raises(UsageError, match="not a Hub id"):
        parse_hub_id(text)


def test_an_existing_path_is_never_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name@v1").mkdir(parents=True)
    (tmp_path / "org" / "gone").symlink_to("nowhere")
    assert not looks_like_hub_id("org/name@v1")
    assert not looks_like_hub_id("org/gone")
    assert looks_like_hub_id("org/name")


# Headers


def test_headers_come_without_the_weights(hub: HubServer, model: Path) -> None:
    commit = hub.add("org/name", model)
    remote = fetch_headers("org/name")
    assert remote.commit == commit
    assert remote.config == CONFIG
    assert remote.index == json.loads((model / "model.safetensors.index.json").read_text())
    assert remote.headers == {name: read_header(model / name) for name in shards(model)}
    assert remote.files == {
        path.relative_to(model).as_posix(): path.stat().st_size
        for path in model.rglob("*")
        if path.is_file()
    }
    for name in shards(model):
        assert hub.sent[f"org/name/{name}"] <= 2**17 < remote.files[name]
    assert hub.sent["org/name/pytorch_model.bin"] == 0


def test_a_header_larger_than_the_first_request(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    raw = render_header([TensorEntry(f"t{i}", "U8", (1,), i, i + 1) for i in range(5000)], None)
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(5000))
    hub.add("org/many", folder)
    assert len(raw) > 2**17
    remote = fetch_headers("org/many")
    assert remote.headers["model.safetensors"] == read_header(folder / "model.safetensors")
    assert remote.index is None
    assert hub.sent["org/many/model.safetensors"] == 8 + len(raw)


def test_a_file_smaller_than_the_first_request(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"w": np.ones(3, np.float32)}, folder / "model.safetensors")
    hub.add("org/tiny", folder)
    assert fetch_headers("org/tiny").headers["model.safetensors"].data_size == 12


def test_a_revision_is_pinned_to_its_commit(hub: HubServer, model: Path) -> None:
    commit = hub.add("org/name", model, revisions=("main", "refs/pr/3"))
    assert fetch_headers("org/name", "refs/pr/3").commit == commit
    resolved = [url for _, url, _ in hub.log if "/resolve/" in url]
    assert resolved
    assert all(f"/resolve/{commit}/" in url for url in resolved)


def test_the_token_goes_to_the_hub_but_not_to_its_storage(
    hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/private", model, token="hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(fetch_headers("org/private").headers) == 2
    at_storage = [headers for _, url, headers in hub.log if url.startswith("/storage/")]
    assert len(at_storage) == 2
    assert not any("authorization" in map(str.lower, headers) for headers in at_storage)


def test_damaged_files_are_named(hub: HubServer, model: Path) -> None:
    damaged = model / shards(model)[1]
    os.truncate(damaged, damaged.stat().st_size - 1)
    commit = hub.add("org/name", model)
    with pytest.raises(CheckpointError) as error:
        fetch_headers("org/name")
    assert f"org/name@{commit[:12]}/{damaged.name}" in message(error)
    assert "truncated" in message(error)


@pytest.mark.parametrize(
    ("remove", "says"),
    [
        ("config.json", "no config.json"),
        ("model-00002-of-00002.safetensors", "'model-00002-of-00002.safetensors', but it is not"),
    ],
)
def test_incomplete_repositories(hub: HubServer, model: Path, remove: str, says: str) -> None:
    (model / remove).unlink()
    hub.add("org/name", model)
    with pytest.raises(CheckpointError) as error:
        fetch_headers("org/name")
    assert says in message(error)


@pytest.mark.parametrize("weight_map", [None, [], {"w": ["file"]}, {"w": "../model.safetensors"}])
def test_an_index_that_makes_no_sense(hub: HubServer, model: Path, weight_map: object) -> None:
    index = {} if weight_map is None else {"weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add("org/name", model)
    with pytest.raises(CheckpointError) as error:
        fetch_headers("org/name")
    assert "org/name: the weight index" in message(error)


def test_a_repository_without_safetensors(hub: HubServer, model: Path) -> None:
    for name in shards(model):
        (model / name).unlink()
    hub.add("org/name", model)
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        fetch_headers("org/name")


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a\\..\\evil", "C:/evil"])
@pytest.mark.parametrize("read", [fetch_headers, download])
def test_a_file_name_that_leaves_the_folder(
    hub: HubServer,
    model: Path,
    name: str,
    read: Callable[[str], object],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    hub.add("org/name", model)
    listed = hub.models["org/name"].files()
    monkeypatch.setattr(Model, "files", lambda self: {**listed, name: model / "config.json"})
    with pytest.raises(CheckpointError) as error:
        read("org/name")
    assert "org/name points outside the folder" in message(error)
    assert "o not trust this checkpoint" in message(error)
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("size", [-1, 1.5, "12", True])
def test_a_file_size_that_is_none(
    hub: HubServer, model: Path, size: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", model)
    send = _Handler.send_json

    def changed(self: _Handler, value: object) -> None:
        if isinstance(value, dict) and "siblings" in value:
            value["siblings"][0]["size"] = size
        send(self, value)

    monkeypatch.setattr(_Handler, "send_json", changed)
    with pytest.raises(CheckpointError, match="invalid size of"):
        fetch_headers("org/name")


# Whole models


def test_download_gives_the_tree_at_a_commit(hub: HubServer, model: Path, tmp_path: Path) -> None:
    commit = hub.add("org/name", model)
    path, downloaded = download("org/name")
    assert downloaded == commit
    assert path.is_relative_to(tmp_path / "home")
    files = {p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file()}
    got = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert got == files - {"pytorch_model.bin"}
    assert all((path / name).read_bytes() == (model / name).read_bytes() for name in got)


def test_the_cache_knows_the_sha256_of_large_files(hub: HubServer, model: Path) -> None:
    hub.add("org/name", model)
    path, _ = download("org/name")
    for name in shards(model):
        assert cached_sha256(path / name) == sha256(model / name)
    assert cached_sha256(path / "config.json") is None
    assert cached_sha256(model / shards(model)[0]) is None


def test_only_the_first_link_names_the_content(tmp_path: Path) -> None:
    """Blobs may be links into a store of all repositories, where names are another hash."""
    store, blobs, snapshot = (tmp_path / name for name in ("blobs/ab", "repo/blobs", "repo/snap"))
    for folder in (store, blobs, snapshot):
        folder.mkdir(parents=True)
    (store / ("ab" * 32)).write_bytes(b"content")
    (blobs / ("cd" * 32)).symlink_to(Path("../../blobs/ab") / ("ab" * 32))
    (snapshot / "model.safetensors").symlink_to(Path("../blobs") / ("cd" * 32))
    (snapshot / "elsewhere").symlink_to(store / ("ab" * 32))
    assert cached_sha256(snapshot / "model.safetensors") == "cd" * 32
    assert cached_sha256(snapshot / "elsewhere") is None


def test_offline_a_downloaded_model_is_found_and_another_is_not(
    hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", model)
    first = download("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(hub.log)
    assert download("org/name") == first
    actions: list[Action] = [download, fetch_headers]
    for action in actions:
        with pytest.raises(HostError) as error:
            action("org/other")
        assert "HF_HUB_OFFLINE is set" in message(error)
    assert len(hub.log) == requests


def test_offline_headers_and_parts_come_from_the_cache(
    hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Hub sends them, and all that looks at headers alone works."""
    commit = hub.add("org/name", model)
    download("org/name")
    online = fetch_headers("org/name")
    parts = [(shards(model)[0], 8, 40), (shards(model)[1], 1000, 1000)]
    sent = [open_ranges(online)(*part) for part in parts]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(hub.log)
    offline = fetch_headers("org/name")
    assert (offline.commit, offline.config) == (commit, CONFIG)
    assert (offline.headers, offline.index) == (online.headers, online.index)
    assert offline.files.items() == {
        (name, size) for name, size in online.files.items() if name != "pytorch_model.bin"
    }
    assert [open_ranges(offline)(*part) for part in parts] == sent
    assert inspect("org/name").commit == commit
    report = diff("org/name", "org/name", DiffOptions(structure_only=True))
    assert report.verdict.same and report.a.commit == commit
    assert len(hub.log) == requests


# When the Hub says no


@pytest.mark.parametrize("action", [fetch_headers, download])
class TestRefusals:
    def test_no_such_model(self, hub: HubServer, action: Action) -> None:
        with pytest.raises(CheckpointError) as error:
            action("org/absent")
        assert "org/absent is neither a folder here nor a model" in message(error)

    def test_no_such_revision(self, hub: HubServer, model: Path, action: Action) -> None:
        hub.add("org/name", model)
        with pytest.raises(CheckpointError) as error:
            action("org/name", "v9")
        assert "org/name has no revision 'v9'" in message(error)

    def test_gated(self, hub: HubServer, model: Path, action: Action) -> None:
        hub.add("org/gated", model, token="hf_other", gated=True)
        with pytest.raises(HostError) as error:
            action("org/gated")
        assert f"gated; accept its terms at {hub.url}/org/gated" in message(error)

    def test_private(self, hub: HubServer, model: Path, action: Action) -> None:
        hub.add("org/private", model, token="hf_other")
        with pytest.raises(CheckpointError, match="if it is private"):
            action("org/private")

    def test_nobody_answers(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Action
    ) -> None:
        hub.url = "http://127.0.0.1:9"
        hub.use(monkeypatch, tmp_path)
        with pytest.raises(HostError) as error:
            action("org/name")
        assert "http://127.0.0.1:9 cannot be reached" in message(error)
        assert "HF_ENDPOINT" in message(error)

    def test_an_id_the_hub_cannot_have(self, hub: HubServer, action: Action) -> None:
        with pytest.raises(UsageError, match="not a Hub id"):
            action("org/a--b")


def test_a_busy_hub_is_asked_again(hub: HubServer, model: Path) -> None:
    hub.add("org/name", model)
    hub.faults.status = [503]
    assert fetch_headers("org/name").config == CONFIG


def test_a_forbidden_file(hub: HubServer, model: Path) -> None:
    hub.add("org/name", model)
    hub.faults.status = [403]
    with pytest.raises(HostError) as error:
        fetch_headers("org/name")
    assert f"{hub.url} refused org/name" in message(error)


def test_a_server_that_sends_whole_files_is_not_listened_to(hub: HubServer, model: Path) -> None:
    hub.add("org/name", model)
    big = model / shards(model)[0]
    with open(big, "ab") as file:  # sparse, far beyond what sockets buffer
        file.truncate(2**26)
    hub.faults.ignore_range = True
    with pytest.raises(HostError) as error:
        fetch_headers("org/name")
    assert "does not send parts of files" in message(error)
    assert hub.sent[f"org/name/{big.name}"] < 2**24


def test_a_connection_that_breaks_off(hub: HubServer, model: Path) -> None:
    hub.add("org/name", model)
    hub.faults.break_off = True
    with pytest.raises(HostError) as error:
        fetch_headers("org/name")
    assert "the connection broke off" in message(error)


def test_a_cache_that_cannot_be_written(
    hub: HubServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", model)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(HostError) as error:
        download("org/name")
    assert f"the Hub cache {tmp_path}/file/hub cannot be used" in message(error)


# The environment, as a user sets it

SHOW = """
import json, sys
from gemma_fold.checkpoint import hub
loaded = "huggingface_hub" in sys.modules
path, commit = hub.download("org/private")
print(json.dumps([loaded, str(path), commit, len(hub.fetch_headers("org/private").headers)]))
"""


def test_environment_variables(tmp_path: Path, model: Path) -> None:
    with HubServer() as server:
        commit = server.add("org/private", model, token="hf_secret")
        environment = os.environ | server.environment(tmp_path / "home") | {"HF_TOKEN": "hf_secret"}
        environment.pop("HF_HUB_CACHE", None)
        answer = subprocess.run(
            [sys.executable, "-c", SHOW],
            env=environment,
            cwd=Path(hub_module.__file__).parents[2],
            stdout=subprocess.PIPE,
            check=True,
        )
    loaded, path, downloaded, headers = json.loads(answer.stdout)
    assert not loaded, "importing the module must not import huggingface_hub"
    assert Path(path).is_relative_to(tmp_path / "home")
    assert downloaded == commit
    assert headers == 2
