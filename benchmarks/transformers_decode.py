"""Times decoding in transformers, stock against folded, and compares their logits.

    python benchmarks/transformers_decode.py --out benchmarks/results/transformers_decode_h200.json

A model of Gemma 3 1B's shape with random weights generates 128 tokens, greedily, at batch 1 and 8:
eagerly with a growing cache, and with a static cache under torch.compile (mode reduce-overhead).
The variants take turns within one process, round after round; figures are medians of whole
`generate` calls, per new token. Beside them stands how far the folded model's logits are from the
stock ones, and how far the stock ones are from themselves at another batch size: the noise floor.
`--model FOLDER` compares the logits of a real checkpoint too. `--tiny` is a rehearsal on CPU.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from run_meta import git_commit  # noqa: E402

import gemma_fold  # noqa: E402
from gemma_fold.engines.transformers import layers  # noqa: E402

SHAPE = {
    "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    "query_pre_attn_scalar": 256, "max_position_embeddings": 32768,
}  # fmt: skip
TINY = {
    **SHAPE, "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "head_dim": 16,
}  # fmt: skip
VARIANTS = {
    "stock": "the model as transformers has it",
    "copy": "the same again, copied: what being another model in the process costs",
    "folded": "gemma_fold.fold_model(model)",
    "unfused": "folded, every norm by itself",
}
LOGIT_ROWS, LOGIT_TOKENS = 8, 256


def build(device: str, shape: dict[str, Any]) -> Any:
    """A Gemma 3 text model in bf16 with random weights, its norm weights spread as real ones."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**shape)
    with torch.device(device):
        model = transformers.Gemma3ForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(mean=1.0, std=0.5)
    return model


def variant(stock: Any, name: str) -> Any:
    if name == "stock":
        return stock
    if name == "copy":
        return copy.deepcopy(stock)
    model = gemma_fold.fold_model(copy.deepcopy(stock))
    if name == "unfused":
        layers.split_layers(model)
    return model


def generator(model: Any, ids: torch.Tensor, new: int, *, static: bool) -> Callable[[], Any]:
    options: dict[str, Any] = {
        "max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    if static:
        options["cache_implementation"] = "static"
        options["compile_config"] = transformers.CompileConfig(mode="reduce-overhead")
        # CPU compiles only when told to.
        options["compile_config"]._compile_all_devices = ids.device.type == "cpu"
    return lambda: model.generate(ids, **options)


def seconds(call: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_decoding(models: dict[str, Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per mode, batch size and variant."""
    for mode in args.modes:
        for batch in args.batch:
            torch.compiler.reset()  # or a second batch size would make the first one dynamic
            generate = {}
            for name, model in models.items():
                ids = prompt(model, batch, args.prompt)
                generate[name] = generator(model, ids, args.new, static=mode == "static")
            times: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(args.warmup + args.rounds):
                # Each variant is first, second, ... in turn.
                names = list(generate)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    taken = seconds(generate[name])
                    if turn >= args.warmup:
                        times[name].append(taken)
            for name in models:
                per_token = [1e3 * t / args.new for t in times[name]]
                row = {
                    "mode": mode,
                    "batch": batch,
                    "variant": name,
                    "ms_per_token": round(statistics.median(per_token), 4),
                    "fastest": round(min(per_token), 4),
                    "slowest": round(max(per_token), 4),
                    "kernels_per_token": kernels(models[name], batch) if mode == "eager"
                    else None,
                }  # fmt: skip
                stock = statistics.median(times["stock"])
                row["speedup"] = round(stock / statistics.median(times[name]), 4)
                print(row, flush=True)
                yield row


def prompt(model: Any, batch: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator)
    return ids.to(model.device)


def kernels(model: Any, batch: int) -> int | None:
    """CUDA kernels that one decode step launches."""
    if not torch.cuda.is_available():
        return None
    ids = prompt(model, batch, 8)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        step = {"input_ids": ids[:, -1:], "past_key_values": cache, "use_cache": True}
        model(**step)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            model(**step)
            synchronize()
    return sum(e.count for e in profile.key_averages() if "Memcpy" not in e.key)


def compare_logits(stock: Any, folded: Any) -> dict[str, float]:
    """Mean and largest KL divergence, in nats: folded from stock, and stock from itself."""
    ids = prompt(stock, LOGIT_ROWS, LOGIT_TOKENS)
    rows = range(LOGIT_ROWS)
    with torch.no_grad():
        alone = [stock(ids[i : i + 1]).logits[0] for i in rows]
        native = [folded(ids[i : i + 1]).logits[0] for i in rows]
        together = list(stock(ids).logits)
        together_native = list(folded(ids).logits)
    return {
        "positions": LOGIT_ROWS * LOGIT_TOKENS,
        **divergence("folded", alone, native),
        **divergence("noise_floor", alone, together),
        **divergence("folded_batched", together, together_native),
    }


def divergence(
    name: str, reference: list[torch.Tensor], other: list[torch.Tensor]
) -> dict[str, float]:
    kl, largest, same = [], 0.0, 0
    for one, two in zip(reference, other, strict=True):
        p, q = (torch.log_softmax(x.double(), -1) for x in (one, two))
        kl.append((p.exp() * (p - q)).sum(-1))
        largest = max(largest, (one.float() - two.float()).abs().max().item())
        same += int((one.argmax(-1) == two.argmax(-1)).sum())
    every = torch.cat(kl)
    return {
        f"{name}_mean_kl": every.mean().item(),
        f"{name}_max_kl": every.max().item(),
        f"{name}_max_abs": largest,
        f"{name}_same_top1": same / every.numel(),
    }


def real_logits(folder: Path, device: str) -> dict[str, Any]:
    load = transformers.AutoModelForCausalLM.from_pretrained
    stock = load(folder, dtype=torch.bfloat16, device_map={"": device}).eval()
    folded = gemma_fold.fold_model(copy.deepcopy(stock))
    return {"model": folder.name, **compare_logits(stock, folded)}


def meta(commit: str) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if torch.cuda.is_available():
        import triton

        versions["triton"] = triton.__version__
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "python": platform.python_version(),
        **versions,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(["benchmarks/transformers_decode.py", *sys.argv[1:]]),
    }


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small shape, few rounds")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["stock", "folded"])
    parser.add_argument(
        "--modes", nargs="+", choices=("eager", "static"), default=["eager", "static"]
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--model", type=Path, help="a real checkpoint whose logits to compare")
    parser.add_argument("--commit", default=git_commit(), help="where .git does not travel along")
    args = parser.parse_args()
    if args.tiny:
        args.new, args.rounds, args.warmup = 8, 2, 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stock = build(device, TINY if args.tiny else SHAPE)
    models = {name: variant(stock, name) for name in dict.fromkeys(["stock", *args.variants])}
    result: dict[str, Any] = {"meta": meta(args.commit), "shape": SHAPE, "variants": VARIANTS}
    if "folded" in models:
        result["logits"] = [{"model": "random weights", **compare_logits(stock, models["folded"])}]
        print(result["logits"][0], flush=True)
        if args.model:
            result["logits"].append(real_logits(args.model, device))
            print(result["logits"][1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result["rows"] = []
    for row in time_decoding(models, args):  # what a time limit cuts off is not lost
        result["rows"].append(row)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
