"""However a weight gets into a running SGLang model, its gain is in step: in place, never doubled.

The oracle is SGLang with the original checkpoint, or float64 for gains.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import patience
import pytest
import tiny
import torch
from safetensors.torch import load_file

from gemma_fold.commands.convert import convert
from gemma_fold.errors import CheckpointError

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is in an environment of its own", allow_module_level=True)

from local_server import free_port
from sglang_checkpoints import Checkpoints

pytestmark = pytest.mark.engine

UPDATED = ("gemma2", "gemma3_text")  # one for each class of norms that SGLang has


class Pushed:
    """What a trainer sends, as raw weights or as gammas, and the parameters that must result."""

    def __init__(self, checkpoints: Checkpoints, sglang: Any, family: str, form: str) -> None:
        kind = checkpoints.original if form == "raw" else checkpoints.folded
        self.folder = kind(family, 1)
        self.tensors = list(load_file(self.folder / "model.safetensors").items())
        self.expected = sglang.Loaded(checkpoints.original(family, 1)).state()


def by_disk(loaded: Any, pushed: Pushed, **options: Any) -> tuple[bool, str]:
    return loaded.updater.update_weights_from_disk(str(pushed.folder), "auto", **options)


def by_tensor(loaded: Any, pushed: Pushed) -> tuple[bool, str]:
    return loaded.updater.update_weights_from_tensor(pushed.tensors)


def by_flattened_bucket(loaded: Any, pushed: Pushed) -> tuple[bool, str]:
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    bucket = FlattenedTensorBucket(named_tensors=pushed.tensors)
    sent = {
        "flattened_tensor": bucket.get_flattened_tensor(),
        "metadata": bucket.get_metadata(),
    }
    return loaded.updater.update_weights_from_tensor(sent, load_format="flattened_bucket")


def by_direct_copy(loaded: Any, pushed: Pushed) -> tuple[bool, str]:
    """Of what SGLang has under its name on disk, and neither stacked nor padded."""
    sizes = {name: value.numel() for name, value in loaded.model.named_parameters()}
    tensors = [(name, value) for name, value in pushed.tensors if sizes.get(name) == value.numel()]
    pushed.expected = loaded.state() | {name: pushed.expected[name] for name, _ in tensors}
    return loaded.updater.update_weights_from_tensor(tensors, load_format="direct")


def by_broadcast(loaded: Any, pushed: Pushed) -> tuple[bool, str]:
    """From rank 0 of a group, which is a process of its own."""
    port = free_port()
    sender = subprocess.Popen(
        [
            *(sys.executable, "-c", SENDER),
            *(str(pushed.folder / "model.safetensors"), str(port), str(patience.seconds(120))),
        ]
    )
    try:
        group = ("127.0.0.1", port, 1, 2, "trainer", "gloo")
        joined, message = loaded.updater.init_weights_update_group(*group)
        assert joined, message
        received = loaded.updater.receive_weights_from_distributed(
            names=[name for name, _ in pushed.tensors],
            dtypes=[tensor.dtype for _, tensor in pushed.tensors],
            shapes=[tensor.shape for _, tensor in pushed.tensors],
            group_name="trainer",
        )
        return loaded.updater.load_weights_from_distributed(received)
    finally:
        loaded.updater.destroy_weights_update_group("trainer")
        sender.kill()
        sender.wait()


SENDER = """
import sys
import time
from datetime import timedelta
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper

wait = timedelta(seconds=float(sys.argv[3]))
store = PrefixStore("trainer", dist.TCPStore("127.0.0.1", int(sys.argv[2]), 2, True, wait))
group, _ = _new_process_group_helper(
    2, 0, [], Backend("gloo"), store, group_name="trainer", timeout=wait
)
dist.distributed_c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
for tensor in load_file(sys.argv[1]).values():
    dist.broadcast(tensor, src=0, group=group)
time.sleep(86_400)  # until it is killed: the group goes away at the other end first
"""


def by_ipc(loaded: Any, pushed: Pushed) -> tuple[bool, str]:
    """What SGLang gives the checkpoint engine to call with the tensors of a peer process."""
    with pytest.MonkeyPatch.context() as patch:
        engine = SimpleNamespace(update_weights_from_ipc=None)  # which would call what follows
        patch.setitem(sys.modules, "checkpoint_engine", SimpleNamespace(worker=engine))
        patch.setitem(sys.modules, "checkpoint_engine.worker", engine)
        from sglang.srt.checkpoint_engine import checkpoint_engine_worker

    worker = checkpoint_engine_worker.SGLangCheckpointEngineWorkerExtensionImpl(loaded)
    worker.get_model_loader()(pushed.tensors)
    return True, ""


PATHS = (by_disk, by_tensor, by_flattened_bucket, by_direct_copy, by_broadcast, by_ipc)


@pytest.mark.parametrize("form", ["raw", "gamma"])
@pytest.mark.parametrize("push", PATHS, ids=lambda path: path.__name__)
@pytest.mark.parametrize("family", UPDATED)
def test_a_push_changes_weight_and_gain_in_place(
    family: str, push: Any, form: str, checkpoints: Checkpoints, sglang: Any
) -> None:
    """Once and again: nothing is added twice."""
    loaded = sglang.Loaded(checkpoints.folded(family))
    addresses = storage(loaded)
    pushed = Pushed(checkpoints, sglang, family, form)
    for _ in range(2):
        succeeded, message = push(loaded, pushed)
        assert succeeded, message
        found = loaded.state()
        assert [n for n in found if not torch.equal(found[n], pushed.expected[n])] == []
        sglang.check_gains(loaded, pushed.expected)
    assert storage(loaded) == addresses


def storage(loaded: Any) -> dict[str, int]:
    model = loaded.model
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def test_a_refused_push_leaves_what_was_there(
    checkpoints: Checkpoints, sglang: Any, tmp_path: Path
) -> None:
    """A truncated gamma: SGLang reports it and loads the old weights again."""
    loaded = sglang.Loaded(checkpoints.folded("gemma2"))
    before = loaded.state()
    wrong = {"model.norm.weight": torch.ones(16, 1)}
    with pytest.raises(CheckpointError, match=r"shape \[32\] cannot take .* \[16\]"):
        loaded.updater.update_weights_from_tensor(list(wrong.items()))
    sglang.check_gains(loaded, before)


@pytest.mark.parametrize("mode", ["stock", "native"])
def test_a_model_of_the_original_refuses_a_folded_checkpoint_from_disk(
    mode: str, checkpoints: Checkpoints, sglang: Any
) -> None:
    """SGLang would stop on a shape, then again as it goes back to what was there, and end."""
    with sglang.mode(mode):
        loaded = sglang.Loaded(checkpoints.original("gemma2"))
    before, path = loaded.state(), loaded.config.model_path
    succeeded, message = by_disk(loaded, Pushed(checkpoints, sglang, "gemma2", "gamma"))
    assert not succeeded
    assert "is a folded checkpoint" in message
    assert "\n" not in message
    assert loaded.config.model_path == path
    after = loaded.state()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []
    succeeded, message = by_disk(loaded, Pushed(checkpoints, sglang, "gemma2", "raw"))
    assert succeeded, message


@pytest.mark.parametrize("kind", ["original", "folded"])
def test_a_folded_checkpoint_with_a_damaged_config_is_refused_from_disk(
    kind: str, checkpoints: Checkpoints, sglang: Any, tmp_path: Path
) -> None:
    damaged = shutil.copytree(checkpoints.folded("gemma2"), tmp_path / "damaged")
    (damaged / "config.json").write_text('{"model_type": "gemma_fold"}')
    loaded = sglang.Loaded(getattr(checkpoints, kind)("gemma2"))
    before = loaded.state()
    succeeded, message = loaded.updater.update_weights_from_disk(str(damaged), "auto")
    assert not succeeded
    assert "config.json" in message
    after = loaded.state()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []


def test_a_folded_model_refuses_gammas_without_the_tensor_lock_from_disk(
    checkpoints: Checkpoints, sglang: Any, tmp_path: Path
) -> None:
    """Their shape is that of raw weights: 1 would be added twice."""
    convert(checkpoints.original("gemma2", 1), tmp_path / "flat", tensor_lock=False)
    loaded = sglang.Loaded(checkpoints.folded("gemma2"))
    before = loaded.state()
    succeeded, message = loaded.updater.update_weights_from_disk(str(tmp_path / "flat"), "auto")
    assert not succeeded
    assert "--no-tensor-lock" in message
    sglang.check_gains(loaded, before)


# Weights that arrive past the loaders of parameters


class Store:
    """A remote key-value store in memory, as SGLang's connectors are."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tensors = folder, {}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set(self, key: str, tensor: torch.Tensor) -> None:
        self.tensors[key.rpartition("/")[2]] = tensor.clone()

    def setstr(self, key: str, text: str) -> None:
        (self.folder / key.rpartition("/")[2]).write_text(text)

    def weight_iterator(self, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors.items())

    def pull_files(self, allow_pattern: list[str]) -> None:
        assert all((self.folder / name).is_file() for name in allow_pattern)

    def get_local_dir(self) -> str:
        return str(self.folder)


def from_sharded_state(sglang: Any, loaded: Any, source: Path, folder: Path, _: Any) -> Any:
    from sglang.srt.model_loader.loader import ShardedStateLoader

    for file in source.glob("*.json"):
        shutil.copy(file, folder)
    ShardedStateLoader.save_model(loaded.model, str(folder))
    return sglang.Loaded(folder, "sharded_state")


def from_remote_store(sglang: Any, loaded: Any, source: Path, folder: Path, patch: Any) -> Any:
    import sglang.srt.connector as connectors
    from sglang.srt.model_loader import loader

    store = Store(folder)
    for module in (loader, connectors):
        patch.setattr(module, "create_remote_connector", lambda *args, **kwargs: store)
    patch.setattr(loader, "get_connector_type", lambda client: loader.ConnectorType.KV)
    loader.RemoteModelLoader.save_model(loaded.model, str(source), "redis://store/model")
    return sglang.Loaded(folder, "remote", weights="redis://store/model")


@pytest.mark.parametrize("arrive", [from_sharded_state, from_remote_store])
@pytest.mark.parametrize("family", UPDATED)
def test_gains_follow_weights_that_are_copied(
    family: str,
    arrive: Any,
    checkpoints: Checkpoints,
    sglang: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoints.folded(family)
    loaded = sglang.Loaded(source)
    copied = arrive(sglang, loaded, source, tmp_path, monkeypatch)
    sglang.check_gains(copied, loaded.state())


def test_sglangs_own_buffer_goes_stale_where_ours_follows(
    checkpoints: Checkpoints, sglang: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same three paths with SGLang's own norms: the reason that gains are followed."""
    source = checkpoints.original("gemma2")
    loaded = sglang.Loaded(source)
    copies = []
    for arrive in (from_sharded_state, from_remote_store):
        folder = tmp_path / arrive.__name__
        folder.mkdir()
        copies.append(arrive(sglang, loaded, source, folder, monkeypatch))
    for norm in (norm for copied in copies for norm in copied.norms().values()):
        assert norm.weight.any()
        assert (norm.gemma_weight == 1).all()

    pushed = Pushed(checkpoints, sglang, "gemma2", "raw")
    before = {name: norm.gemma_weight.clone() for name, norm in loaded.norms().items()}
    by_direct_copy(loaded, pushed)
    for name, norm in loaded.norms().items():
        assert torch.equal(norm.weight, pushed.expected[f"{name}.weight"])
        assert torch.equal(norm.gemma_weight, before[name])
        assert not torch.equal(norm.gemma_weight, norm.weight + 1)


def test_gains_survive_a_pause_that_frees_memory(checkpoints: Checkpoints, sglang: Any) -> None:
    """SGLang's memory saver stashes buffers, loses parameters, and has the weights sent again."""
    from sglang.srt.managers.scheduler_components import weight_updater as saver

    loaded = sglang.Loaded(checkpoints.folded("gemma2"))
    stashed = saver._export_static_state(loaded.model)
    with torch.no_grad():
        for tensor in [*loaded.model.parameters(), *loaded.model.buffers()]:
            tensor.fill_(7)
    saver._import_static_state(loaded.model, stashed)
    for norm in loaded.norms().values():
        assert not (norm.gamma32 == 7).any()
    pushed = Pushed(checkpoints, sglang, "gemma2", "gamma")
    by_tensor(loaded, pushed)
    sglang.check_gains(loaded, pushed.expected)


def test_the_gain_stays_on_the_device_when_the_weight_is_offloaded(sglang: Any) -> None:
    """The meta device stands for the GPU here; SGLang's own loader of 0.5.21 stops at two."""
    from sglang.srt.layers.layernorm import Gemma3RMSNorm, GemmaRMSNorm

    from gemma_fold.engines.sglang.all_reduce import StockNorm
    from gemma_fold.engines.sglang.norms import adopt

    weight = torch.randn(8)
    for kind in (GemmaRMSNorm, Gemma3RMSNorm):
        with torch.device("meta"):
            norm = kind(8)
            norm.weight = torch.nn.Parameter(torch.zeros(8, device="cpu"))
            adopt(norm, StockNorm)
        assert norm.gamma32.device.type == "meta"
        norm.weight.weight_loader(norm.weight, weight)
        assert torch.equal(norm.weight, weight)
    with torch.device("meta"):
        stock = GemmaRMSNorm(8)
    stock.weight = torch.nn.Parameter(torch.zeros(8))
    if version("sglang") == "0.5.21":  # 0.5.23 copies the weight over first
        with pytest.raises(RuntimeError, match="device"):
            stock._weight_loader(stock.weight, weight)


def test_an_fp32_checkpoint_served_in_bf16_rounds_its_weights_once(
    checkpoints: Checkpoints, sglang: Any, tmp_path: Path
) -> None:
    original, folded = checkpoints.original("gemma3_text"), tmp_path / "folded"
    source = tiny.with_norms_near_0(original, tmp_path / "source")
    convert(source, folded)
    expected, loaded = sglang.Loaded(source), sglang.Loaded(folded)
    assert loaded.model.model.norm.weight.dtype == torch.bfloat16
    for name, parameter in expected.model.named_parameters():
        assert torch.equal(loaded.state()[name], parameter), name
