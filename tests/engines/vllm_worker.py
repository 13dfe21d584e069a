"""Runs real vLLM engines for test_vllm.py: `python vllm_worker.py JOB RESULT ARGUMENTS...`.

Starting vLLM takes most of a minute, so a job runs many models in one process, where it can: with
`VLLM_ENABLE_V1_MULTIPROCESSING=0` an engine starts in seconds. What a job found is written to
RESULT as JSON; the test judges it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm_engine import Outputs, compare, engine, outputs, run
from vllm_probes import draft_norms, first_norm, native_norms, norm_weights, reducing_norms


def _run_native(folder: Path) -> tuple[Outputs, int]:
    """The outputs, and how many norms hold gamma. An engine must be gone before the next starts."""
    with engine(folder, "native") as llm:
        return outputs(llm), llm.apply_model(native_norms)[0]


def families(root: Path, names: str) -> dict[str, Any]:
    """Original and folded, by vLLM's norms and by ours; ours against vLLM's in fp32."""
    found = {}
    for name in names.split(","):
        original, folded = root / name, root / f"{name}-folded"
        stock, fold_at_load = run(original), run(original, "native")
        found[name] = {
            "stock": compare(stock, run(folded)),
            "native_runs": compare(stock, fold_at_load),
        }
        native, found[name]["native_norms"] = _run_native(folded)
        found[name]["native"] = compare(fold_at_load, native)
        if name in ("gemma", "gemma2", "gemma3_text"):
            precise = run(original, dtype="float32")
            found[name]["fp32"] = compare(precise, run(folded, "native", dtype="float32"))
    return found


def reloads(root: Path) -> dict[str, Any]:
    """Every kind of live update, in both modes: what the engine says after each."""
    original, folded = root / "gemma3_untied", root / "gemma3_untied-folded"
    other, other_folded = root / "gemma3_other", root / "gemma3_other-folded"

    def each(mode: str) -> dict[str, Any]:  # the engine must be gone before the next one starts
        want, want_other = run(original, mode), run(other, mode)
        with engine(folded, mode) as llm:
            steps = _reload_each(llm, folded, other, other_folded, want, want_other)
        return {"differ": want != want_other, "steps": steps}

    return {mode: each(mode) for mode in ("stock", "native")}


def _reload_each(
    llm: Any, folded: Path, other: Path, other_folded: Path, want: Outputs, want_other: Outputs
) -> dict[str, Any]:
    places = _norm_storage(llm)

    def after(wanted: Outputs, **how: Any) -> dict[str, Any]:
        llm.collective_rpc("reload_weights", kwargs=how)
        llm.reset_prefix_cache()
        return {**compare(wanted, outputs(llm)), "in_place": _norm_storage(llm) == places}

    def push(folder: Path) -> dict[str, Any]:
        return {"weights_iterator": list(tensors(folder).items())}

    steps = {
        "disk": after(want),
        "raw pushed": after(want_other, **push(other)),
        "gammas pushed": after(want, **push(folded)),
        "gammas pushed twice": after(want, **push(folded)),
        "other folded path": after(want_other, weights_path=str(other_folded)),
        "original path": after(want_other, weights_path=str(other)),
        "folded path": after(want, weights_path=str(folded)),
    }
    norms = {n: t for n, t in tensors(other_folded).items() if t.shape[1:] == (1,)}
    llm.apply_model(lambda model: model.load_weights(iter(norms.items())) and None)
    weight = llm.apply_model(first_norm)[0]
    gamma = norms["model.layers.0.input_layernorm.weight"].view(-1)
    steps["norms alone"] = {"taken": bool((weight == gamma).all())}
    steps["kernel format"] = _kernel_format(llm, tensors(other), tensors(other_folded))
    return steps


def _kernel_format(llm: Any, raw: Any, gammas: Any) -> dict[str, Any]:
    """Updates that bypass the loaders: what the parameter does not hold must be refused."""
    name = "model.layers.0.input_layernorm.weight"
    before = llm.apply_model(first_norm)[0]
    verdicts = {}
    for what, tensor in {"raw": raw[name], "gamma": gammas[name]}.items():
        try:
            llm.collective_rpc(
                "reload_weights",
                kwargs={"weights_iterator": [(name, tensor)], "is_checkpoint_format": False},
            )
            taken = bool((llm.apply_model(first_norm)[0] == gammas[name].view(-1)).all())
            verdicts[what] = "taken" if taken else "wrong"
        except Exception as error:
            same = bool((llm.apply_model(first_norm)[0] == before).all())
            verdicts[what] = f"refused: {error}" if same else "damaged"
    return verdicts


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _norm_storage(llm: Any) -> list[int]:
    def pointers(model: Any) -> list[int]:
        return [p.data_ptr() for n, p in model.named_parameters() if n.endswith("norm.weight")]

    return llm.apply_model(pointers)[0]


def refusals(root: Path) -> dict[str, Any]:
    """What each bad input says."""
    found = {}
    for name in ("later_format", "unlocked", "stray_raw", "stray_gamma"):
        found[name] = _message(lambda name=name: run(root / name))
    found["mode"] = _message(lambda: run(root / "gemma3_text-folded", "fast"))
    return found


def _message(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def others(root: Path) -> dict[str, Any]:
    """Two models in one process, the Transformers backend, and an int8 original."""
    folded, original = root / "gemma3_text-folded", root / "gemma3_text"
    want = run(original)
    found: dict[str, Any] = {}
    backend = {"model_impl": "transformers"}
    found["transformers"] = compare(run(original, **backend), run(folded, **backend))
    found["after"] = compare(want, run(original))
    quantized = run(root / "gemma3_int8")
    found["int8"] = compare(quantized, run(root / "gemma3_int8-folded"))
    found["int8_native"] = compare(quantized, run(root / "gemma3_int8-folded", "native"))
    found["int8_differs"] = quantized != want
    return found


def compiled(root: Path) -> dict[str, Any]:
    """torch.compile: original against folded, by vLLM's norms and by ours, q and k both ways."""
    folded, original = root / "gemma3_text-folded", root / "gemma3_text"
    options = {"enforce_eager": False}
    stock = run(original, **options)
    native = run(original, "native", **options)
    found = {
        "stock": compare(stock, run(folded, **options)),
        "native": compare(native, run(folded, "native", **options)),
        "native_runs": compare(stock, native),
    }
    for how in ("fused", "cached"):
        os.environ["GEMMA_FOLD_QK"] = how
        found[f"{how}_qk"] = compare(native, run(folded, "native", **options))
    return found


def missing(root: Path) -> dict[str, Any]:
    """What vLLM says of a folded checkpoint without the plug-in."""
    return {"message": _message(lambda: run(root / "gemma3_text-folded"))}


def tensor_parallel(root: Path) -> dict[str, Any]:
    """Two ranks, by vLLM's norms and by ours with the all-reduces left to them."""
    folded, original = root / "gemma3_text-folded", root / "gemma3_text"
    options = {"tensor_parallel_size": 2}
    stock = run(original, **options)
    found: dict[str, Any] = {"stock": compare(stock, run(folded, **options))}
    with engine(folded, "native", **options) as llm:
        found["native_runs"] = compare(stock, outputs(llm))
        found["reducing_norms"] = llm.apply_model(reducing_norms)
    return found


def drafts(original: Path, folded: Path) -> dict[str, Any]:
    """Multi-token prediction: what comes out, how much was accepted, and the draft's norms."""
    found: dict[str, Any] = {}
    for mode in ("stock", "native"):
        want, accepted, weights = _speculate(original, mode)
        said, taken, norms = _speculate(folded, mode)
        found[mode] = {
            **compare(want, said),
            "accepted": [accepted, taken],
            "norms": len(norms),
            "norms_equal": norms == weights,
        }
    return found


def _speculate(folder: Path, mode: str | None = None) -> tuple[Outputs, dict[str, float], Any]:
    speculation = {"method": "mtp", "num_speculative_tokens": 2}
    options = {"disable_log_stats": False, "enable_prefix_caching": False}
    with engine(folder, mode, speculative_config=speculation, **options) as llm:
        said = outputs(llm)
        counts = {
            metric.name: metric.value
            for metric in llm.get_metrics()
            if metric.name.startswith("vllm:spec_decode") and hasattr(metric, "value")
        }
        return said, counts, llm.collective_rpc(draft_norms)[0]


def adapters(root: Path, adapter: Path, with_norms: Path) -> dict[str, Any]:
    """LoRA on the original and on the folded checkpoint."""
    original, folded = root / "gemma3_text", root / "gemma3_text-folded"

    def adapted(folder: Path, mode: str | None = None) -> Outputs:
        with engine(folder, mode, enable_lora=True) as llm:
            return outputs(llm, adapter)

    def refused() -> Outputs:
        with engine(folded, enable_lora=True) as llm:
            return outputs(llm, with_norms)

    stock = adapted(original)
    return {
        "acts": compare(run(original), stock),
        "stock": compare(stock, adapted(folded)),
        "native_runs": compare(stock, adapted(folded, "native")),
        "with_norms": _message(refused),
    }


def wide_norms(original: Path, folded: Path) -> dict[str, Any]:
    """Norms stored in fp32 and served in bf16: weights of both, at the start and reloaded."""

    def weights(folder: Path) -> tuple[Outputs, list[dict[str, torch.Tensor]]]:
        with engine(folder, "stock") as llm:
            said, loaded = outputs(llm), llm.apply_model(norm_weights)[0]
            llm.collective_rpc("reload_weights")
            return said, [loaded, llm.apply_model(norm_weights)[0]]

    (said, want), (says, got) = weights(original), weights(folded)
    return {
        "outputs": compare(said, says),
        "norms": [len(found) for found in (*want, *got)],
        "dtypes": sorted({str(weight.dtype) for weight in want[0].values()}),
        "differing": [
            sum(not torch.equal(one[name], want[0][name]) for name in want[0])
            for one in (*want, *got)
        ],
    }


JOBS = (
    wide_norms,
    drafts,
    adapters,
    families,
    reloads,
    refusals,
    others,
    missing,
    compiled,
    tensor_parallel,
)


def main() -> None:
    job, result, *arguments = sys.argv[1:]
    found = {j.__name__: j for j in JOBS}[job](*map(_argument, arguments))
    Path(result).write_text(json.dumps(found))


def _argument(text: str) -> Any:
    return Path(text) if "/" in text else text


if __name__ == "__main__":
    main()
