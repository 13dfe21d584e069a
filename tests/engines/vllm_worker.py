"""Runs real vLLM engines for test_vllm.py: `python vllm_worker.py JOB RESULT ARGUMENTS...`.

Starting vLLM takes most of a minute, so a job runs many models in one process, where it can: with
`VLLM_ENABLE_V1_MULTIPROCESSING=0` an engine starts in seconds. What a job found is written to
RESULT as JSON; the test judges it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

#: Where a picture goes, by model type.
PICTURES = {
    "gemma3": (5, 17, 91, 23),
    "paligemma": (5, 17, 23),
    "qwen3_5": (5, 17, 92, 90, 93, 23),
    "qwen3_5_moe": (5, 17, 92, 90, 93, 23),
}
PROMPTS = ((5, 17, 99, 23, 4, 61, 7), (300, 2, 41), (8,) * 20, tuple(range(77, 87)))
TOKENS = 48
Outputs = list[dict[str, Any]]


@contextmanager
def engine(folder: Path, mode: str | None = None, **options: Any) -> Iterator[Any]:
    """A vLLM engine. `mode` is GEMMA_FOLD; None leaves it unset."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ.pop("GEMMA_FOLD", None)
    if mode is not None:
        os.environ["GEMMA_FOLD"] = mode
    in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    settings = {
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 1 << 25,
        "skip_tokenizer_init": not (folder / "tokenizer_config.json").exists(),
        **({"distributed_executor_backend": "uni"} if in_process else {}),
        **options,
    }
    llm = LLM(str(folder), **settings)
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        if in_process:
            cleanup_dist_env_and_memory()


def outputs(llm: Any) -> Outputs:
    """48 greedy tokens after each prompt, with the top 5 log-probabilities of all positions.

    One more prompt has a picture, if the model sees pictures.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=5,
        prompt_logprobs=5,
    )
    prompts: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
    picture = PICTURES.get(llm.llm_engine.vllm_config.model_config.hf_config.model_type)
    if picture:
        prompts.append({"prompt_token_ids": list(picture), "multi_modal_data": _picture()})
    return [
        {
            "tokens": list(request.outputs[0].token_ids),
            "logprobs": [_plain(top) for top in request.outputs[0].logprobs],
            "prompt": [_plain(top) for top in request.prompt_logprobs if top],
        }
        for request in llm.generate(prompts, params, use_tqdm=False)
    ]


def _picture() -> dict[str, Any]:
    from PIL import Image

    pixels = torch.arange(8 * 8 * 3, dtype=torch.uint8).view(8, 8, 3)
    return {"image": Image.fromarray(pixels.numpy())}


def _plain(top: Any) -> dict[int, float]:
    return {token: entry.logprob for token, entry in top.items()}


def compare(a: Outputs, b: Outputs) -> dict[str, Any]:
    """How many tokens differ, and the largest difference of a log-probability of the prompts."""
    pairs = list(zip(a, b, strict=True))
    tokens = [
        (x, y) for one, two in pairs for x, y in zip(one["tokens"], two["tokens"], strict=True)
    ]
    differences = [
        abs(top[token] - other[token])
        for one, two in pairs
        for top, other in zip(one["prompt"], two["prompt"], strict=True)
        for token in top.keys() & other.keys()
    ]
    return {
        "identical": a == b,
        "tokens": len(tokens),
        "different_tokens": sum(x != y for x, y in tokens),
        "max_logprob_difference": max(differences),
        "distinct_tokens": len({x for x, _ in tokens}),
    }


def run(folder: Path, mode: str | None = None, **options: Any) -> Outputs:
    with engine(folder, mode, **options) as llm:
        return outputs(llm)


def _run_native(folder: Path) -> tuple[Outputs, int]:
    """The outputs, and how many norms hold gamma. An engine must be gone before the next starts."""
    with engine(folder, "native") as llm:
        return outputs(llm), llm.apply_model(_native_norms)[0]


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
    original, folded = root / "gemma3_text", root / "gemma3_text-folded"
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
    weight = llm.apply_model(_first_norm)[0]
    gamma = norms["model.layers.0.input_layernorm.weight"].view(-1)
    steps["norms alone"] = {"taken": bool((weight == gamma).all())}
    steps["kernel format"] = _kernel_format(llm, tensors(other), tensors(other_folded))
    return steps


def _kernel_format(llm: Any, raw: Any, gammas: Any) -> dict[str, Any]:
    """Updates that bypass the loaders: what the parameter does not hold must be refused."""
    name = "model.layers.0.input_layernorm.weight"
    before = llm.apply_model(_first_norm)[0]
    verdicts = {}
    for what, tensor in {"raw": raw[name], "gamma": gammas[name]}.items():
        try:
            llm.collective_rpc(
                "reload_weights",
                kwargs={"weights_iterator": [(name, tensor)], "is_checkpoint_format": False},
            )
            taken = bool((llm.apply_model(_first_norm)[0] == gammas[name].view(-1)).all())
            verdicts[what] = "taken" if taken else "wrong"
        except Exception as error:
            same = bool((llm.apply_model(_first_norm)[0] == before).all())
            verdicts[what] = f"refused: {error}" if same else "damaged"
    return verdicts


def _native_norms(model: Any) -> int:
    return sum(hasattr(module, "gamma") for module in model.modules())


def _reducing_norms(model: Any) -> int:
    return sum(bool(getattr(module, "workspace", None)) for module in model.modules())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _norm_storage(llm: Any) -> list[int]:
    def pointers(model: Any) -> list[int]:
        return [p.data_ptr() for n, p in model.named_parameters() if n.endswith("norm.weight")]

    return llm.apply_model(pointers)[0]


def _first_norm(model: Any) -> torch.Tensor:
    """The gain of the first norm, fp32 [H], whatever the module holds."""
    weight = model.model.layers[0].input_layernorm.weight.detach()
    return weight.view(-1).clone() if weight.dim() == 2 else weight.float() + 1.0


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
    """Two models in one process, and the Transformers backend."""
    folded, original = root / "gemma3_text-folded", root / "gemma3_text"
    want = run(original)
    found: dict[str, Any] = {}
    backend = {"model_impl": "transformers"}
    found["transformers"] = compare(run(original, **backend), run(folded, **backend))
    found["after"] = compare(want, run(original))
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
    os.environ["GEMMA_FOLD_QK"] = "fused"
    found["fused_qk"] = compare(native, run(folded, "native", **options))
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
        found["reducing_norms"] = llm.apply_model(_reducing_norms)
    return found


JOBS = (families, reloads, refusals, others, missing, compiled, tensor_parallel)


def main() -> None:
    job, result, *arguments = sys.argv[1:]
    found = {j.__name__: j for j in JOBS}[job](*map(_argument, arguments))
    Path(result).write_text(json.dumps(found))


def _argument(text: str) -> Any:
    return Path(text) if "/" in text else text


if __name__ == "__main__":
    main()
