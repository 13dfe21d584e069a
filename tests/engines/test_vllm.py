"""Real vLLM on the CPU: a folded checkpoint says what its original says, to the bit.

`make engines` runs this in an environment with vLLM. The work is done by `vllm_worker.py`, in one
process for all jobs that can share one, because vLLM takes most of a minute to start.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import patience
import pytest
import tiny
import torch
import vllm_models
from local_server import free_port, running
from safetensors.torch import load_file, save_file

from gemma_fold.commands.convert import convert

pytestmark = pytest.mark.engine

WORKER = Path(__file__).with_name("vllm_worker.py")
FAMILIES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "gemma3",
    "paligemma",
    "qwen3_5",
    "qwen3_5_moe",
    "nemotron",
)
NATIVE = FAMILIES[:-1]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the worker sends functions to ask a model
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are shared with other processes
    "VLLM_ENGINE_READY_TIMEOUT_S": f"{patience.seconds(600):.0f}",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": f"{patience.seconds(300):.0f}",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
TOKENS = 4 * 48


class Worker:
    """Jobs of the worker, one after the other in one process. `environment`: what it gets more."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self._log = folder / "worker.log"
        env = {k: v for k, v in os.environ.items() if not k.startswith("GEMMA_FOLD")}
        env |= {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def work(self, job: str, *arguments: str | Path) -> Any:
        """What a job found."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([job, *map(str, arguments)]), file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], patience.seconds(900))
        line = self._process.stdout.readline() if ready else ""
        answer = json.loads(line) if line else {"failed": "no answer"}
        if "failed" in answer:
            pytest.fail(f"{job}: {answer['failed']}\n{self._log.read_text()[-6000:]}")
        return answer["found"]

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def working(folder: Path, **environment: str) -> Iterator[Worker]:
    worker = Worker(folder, **environment)
    try:
        yield worker
    finally:
        worker.end()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What vLLM keeps from one start to the next is of these tests alone, and shared by them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def worker(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with working(tmp_path_factory.mktemp("worker")) as started:
        yield started


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the original and the folded checkpoint of every family."""
    root = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        vllm_models.save(name, root / name)
        convert(root / name, root / f"{name}-folded")
    # With AMX, vLLM packs a tied head when it starts, and no reload of stock vLLM renews that copy.
    for seed, name in enumerate(("gemma3_untied", "gemma3_other")):
        vllm_models.save("gemma3_text", root / name, seed, tie_word_embeddings=False)
        convert(root / name, root / f"{name}-folded")
    return root


def assert_identical(found: dict[str, Any]) -> None:
    assert found["tokens"] >= TOKENS
    assert found["different_tokens"] == 0
    assert found["max_logprob_difference"] == 0.0
    assert found["identical"]
    assert found["distinct_tokens"] > 1, "a constant answer would agree with anything"


def assert_close(found: dict[str, Any], difference: float) -> None:
    """As near as another order of roundings allows."""
    assert 0 <= found["max_logprob_difference"] <= difference


# --- families ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def families(models: Path, worker: Worker) -> Any:
    return worker.work("families", models, ",".join(FAMILIES))


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_mode_gives_the_bits_of_the_original(families: Any, name: str) -> None:
    assert_identical(families[name]["stock"])


@pytest.mark.parametrize("name", FAMILIES)
def test_native_mode_folds_an_original_at_load_to_the_same_bits(families: Any, name: str) -> None:
    assert_identical(families[name]["native"])


@pytest.mark.parametrize("name", FAMILIES)
def test_native_mode_says_what_stock_norms_say(families: Any, name: str) -> None:
    assert_close(families[name]["native_runs"], 0.05)  # bf16, where the roundings differ
    if "fp32" in families[name]:
        assert_close(families[name]["fp32"], 1e-4)


def test_native_mode_is_native_where_it_should_be(families: Any) -> None:
    assert {name for name in FAMILIES if families[name]["native_norms"]} == {*NATIVE}


# --- live updates --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def reloads(models: Path, worker: Worker) -> Any:
    return worker.work("reloads", models)


@pytest.mark.parametrize("mode", ["stock", "native"])
@pytest.mark.parametrize(
    "step",
    [
        "disk",
        "raw pushed",
        "gammas pushed",
        "gammas pushed twice",
        "other folded path",
        "original path",
        "folded path",
    ],
)
def test_an_update_lands_in_place_and_says_what_a_fresh_start_says(
    reloads: Any, mode: str, step: str
) -> None:
    assert reloads[mode]["differ"], "the two models must be told apart"
    found = reloads[mode]["steps"][step]
    assert_identical(found)
    assert found["in_place"]


@pytest.mark.parametrize("mode", ["stock", "native"])
def test_norms_can_be_pushed_alone(reloads: Any, mode: str) -> None:
    assert reloads[mode]["steps"]["norms alone"]["taken"]


@pytest.mark.parametrize("mode", ["stock", "native"])
def test_what_bypasses_the_loaders_is_taken_right_or_refused(reloads: Any, mode: str) -> None:
    for verdict in reloads[mode]["steps"]["kernel format"].values():
        assert verdict == "taken" or verdict.startswith("refused"), verdict


# --- the same in every batch, and after every update ---------------------------------------------


@pytest.fixture(scope="session")
def determinism(
    own_cache: None, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Of a process of its own: these jobs set variables."""
    folder = tmp_path_factory.mktemp("determinism")
    with working(folder) as alone:
        updates = alone.work("updates", models, folder)
        return {"updates": updates, "invariance": alone.work("invariance", models)}


def test_no_norm_of_native_mode_tells_batches_apart(determinism: dict[str, Any]) -> None:
    """The log-probabilities, too, as far as vLLM's own products on a CPU allow."""
    found = determinism["invariance"]
    for rows in found["rows"]:
        again, changed = rows["Norm"]
        assert again > 1000 and changed == 0
    assert len(found["said"]) == 5
    for said in found["said"].values():
        assert said["distinct_tokens"] > 1
        assert_close(said, 0.05)


def test_a_hundred_updates_leave_the_norms_of_the_trainer(determinism: dict[str, Any]) -> None:
    found = determinism["updates"]
    assert len(found["updates"]) == 100
    for one in found["updates"]:
        assert one["different"] == []
        assert one["norms"] == one["states"] == 0 and one["compared"] > 1000
        assert_close({"max_logprob_difference": one["whole"]}, 0.1)
        assert one["held"] == 13
    assert sum(one["moved"] > 0 for one in found["updates"]) > 50
    assert found["fresh"], "an engine that starts with these weights says something else"


# --- what is refused -----------------------------------------------------------------------------


def edit_config(source: Path, folder: Path, **values: Any) -> None:
    """A copy whose gemma_fold block has other values."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["gemma_fold"].update(values)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensor(source: Path, folder: Path, name: str, tensor: torch.Tensor) -> None:
    """A copy that holds `tensor` under `name`."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    assert name in tensors
    save_file({**tensors, name: tensor}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="session")
def refusals(models: Path, worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("broken")
    gemma, qwen = models / "gemma3_text-folded", models / "qwen3_5_text-folded"
    edit_config(gemma, root / "later_format", format=2)
    convert(models / "gemma3_text", root / "unlocked", tensor_lock=False)
    norm = "model.layers.0.input_layernorm.weight"
    raw = load_file(models / "gemma3_text" / "model.safetensors")[norm]
    edit_tensor(gemma, root / "stray_raw", norm, raw)
    plain = "model.layers.0.linear_attn.norm.weight"
    gamma = torch.ones(128, 1)
    edit_tensor(qwen, root / "stray_gamma", plain, gamma)
    shutil.copytree(gemma, root / "gemma3_text-folded")
    return worker.work("refusals", root)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("later_format", r"format 2.*upgrade gemma-fold"),
        ("unlocked", r"without the tensor lock.*without --no-tensor-lock"),
        ("stray_raw", r"1 of 13 norms in .* are not folded.*fold the original again"),
        ("stray_gamma", r"does not load the folded Qwen3_5ForCausalLM.*serve the original"),
        ("mode", r"invalid GEMMA_FOLD='fast': expected 'native', 'stock' or 'require'"),
    ],
)
def test_a_wrong_checkpoint_is_refused_with_what_to_do(
    refusals: Any, case: str, message: str
) -> None:
    assert re.search(message, refusals[case]), refusals[case]


def test_without_the_plugin_vllm_stops_at_start(models: Path, tmp_path: Path) -> None:
    with working(tmp_path, VLLM_PLUGINS="") as worker:
        message = worker.work("missing", models)["message"]
    assert "gemma_fold" in message and "does not recognize" in message


# --- several models, compilation, tensor parallelism ---------------------------------------------


def test_models_of_both_kinds_in_one_process_and_of_transformers_and_quantized(
    models: Path, worker: Worker
) -> None:
    vllm_models.quantize(models / "gemma3_text", models / "gemma3_int8")
    convert(models / "gemma3_int8", models / "gemma3_int8-folded")
    found = worker.work("others", models)
    assert_identical(found["transformers"])
    assert_identical(found["after"])
    assert found["int8_differs"], "int8 must show"
    assert_identical(found["int8"])
    assert_close(found["int8_native"], 0.05)


def test_torch_compile(models: Path, tmp_path: Path) -> None:
    # What was run before in a process can change what the compiler makes of a model.
    with working(tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache")) as worker:
        found = worker.work("compiled", models)
    assert_identical(found["stock"])
    assert_identical(found["native"])
    assert_close(found["native_runs"], 0.05)
    assert_close(found["fused_qk"], 0.05)
    assert_identical(found["cached_qk"])  # as it would be: the CPU's backend has its own write
    said = re.findall(
        r"q and k and writes the KV cache: (.*)", (tmp_path / "worker.log").read_text()
    )
    assert said and all("writes the cache in its own way" in line for line in said)


def test_two_ranks(models: Path, worker: Worker) -> None:
    found = worker.work("tensor_parallel", models)
    assert_identical(found["stock"])
    assert_close(found["native_runs"], 0.05)
    assert found["reducing_norms"] == [4, 4]  # two layers, two projections each


# --- drafts and adapters -------------------------------------------------------------------------


def test_multi_token_prediction(worker: Worker, tmp_path: Path) -> None:
    original, folded = tmp_path / "original", tmp_path / "folded"
    vllm_models.save("qwen3_5_text", original)
    vllm_models.add_draft(original)
    convert(original, folded)
    found = worker.work("drafts", original, folded)
    for mode in ("stock", "native"):
        assert_identical(found[mode])
        assert found[mode]["norms"] == 7  # two of the layer, q, k, and three around it
        assert found[mode]["norms_equal"], "the draft's norms are not those of the original"
        want, got = found[mode]["accepted"]
        assert want == got and want["vllm:spec_decode_num_draft_tokens"] > 0


def test_adapters(models: Path, worker: Worker, tmp_path: Path) -> None:
    original = models / "gemma3_text"
    adapter = vllm_models.save_adapter(tmp_path / "adapter", original)
    with_norms = vllm_models.save_adapter(tmp_path / "norms", original, norms=True)
    found = worker.work("adapters", models, adapter, with_norms)
    assert not found["acts"]["identical"], "the adapter must show"
    assert_identical(found["stock"])
    assert_close(found["native_runs"], 0.05)
    assert "modules_to_save" in found["with_norms"]


def test_fp32_norms_served_in_bf16_are_rounded_once(
    models: Path, worker: Worker, tmp_path: Path
) -> None:
    original = tiny.with_norms_near_0(models / "gemma3_untied", tmp_path / "original")
    folded = tmp_path / "folded"
    convert(original, folded)
    found = worker.work("wide_norms", original, folded)
    assert found["norms"] == [13] * 4 and found["dtypes"] == ["torch.bfloat16"]
    assert found["differing"] == [0] * 4
    assert_identical(found["outputs"])


# --- the real 270M, through the commands ---------------------------------------------------------


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "gemma_fold", *map(str, arguments)]


@contextmanager
def server(arguments: list[str], log: Path) -> Iterator[str]:
    """The address of a server that is ready; it is stopped at the end."""
    port = free_port()
    with running([*arguments, f"--port={port}"], port, log, ENVIRONMENT) as address:
        yield address


def report(text: Path, *arguments: str | Path) -> Any:
    """What `gemma-fold diff --json` finds of two sides that are the same, over a short text."""
    text.write_text(
        files("gemma_fold.compare.outputs").joinpath("text.txt").read_text("utf-8")[:1500]
    )
    options = ("--text", text, "--new-tokens", "16", "--json")
    done = subprocess.run(
        command("diff", *arguments, *options),
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=patience.seconds(900),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def assert_same_outputs(found: Any) -> None:
    stats = found["outputs"]["stats"]
    assert stats["positions"] > 200
    assert stats["positions_differing"] == 0 and stats["max_abs"] == 0
    assert all(c["diverges_at"] is None for c in found["outputs"]["greedy"])


def test_served_alike(real_270m: Path, folded_270m: Path, tmp_path: Path) -> None:
    options = ["--max-model-len", "2048", "--enforce-eager"]
    stock = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(real_270m), *options]
    ours = command("serve", folded_270m, "--engine", "vllm")
    with (
        server(stock, tmp_path / "stock.log") as a,
        server([*ours, *options], tmp_path / "ours.log") as b,
    ):
        wait = f"{patience.seconds(600):.0f}"
        found = report(tmp_path / "text", a, b, "--timeout", wait, "--no-noise-floor")
    assert_same_outputs(found)


def test_diff_runs_vllm(real_270m: Path, folded_270m: Path, tmp_path: Path) -> None:
    found = report(tmp_path / "text", real_270m, folded_270m, "--engine", "vllm")
    assert_same_outputs(found)
    assert found["outputs"]["engines"] == ["vllm, bfloat16 on cpu"] * 2
    # What was decoded is what was read, and in bf16 not to the last bit.
    floor = found["outputs"]["floor"]
    assert 0 < floor["kl_ab"]["mean"] < 0.01 and floor["same_top"] > 0.9


def test_diff_runs_the_original_as_vllm_does(
    real_270m: Path, folded_270m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where GEMMA_FOLD asks for native mode, which would fold the original as it loads."""
    monkeypatch.setenv("GEMMA_FOLD", "native")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the test above has processes
    options = ("--engine", "vllm", "--max-kl", "0.01", "--no-noise-floor")
    found = report(tmp_path / "text", real_270m, folded_270m, *options)
    assert 0 < found["outputs"]["stats"]["kl_ab"]["mean"] < 0.01
