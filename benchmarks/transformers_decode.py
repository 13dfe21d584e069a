"""Times decoding in transformers, stock against folded, and compares their logits.

    python -m benchmarks.transformers_decode --out benchmarks/results/transformers_decode_h200.json

A model of Gemma 3 1B's shape with random weights generates 128 tokens, greedily, at batch 1 and 8:
eagerly with a growing cache, and with a static cache under torch.compile (mode reduce-overhead).
The variants take turns within one process, round after round; figures are medians of whole
`generate` calls, per new token. Beside them stands how far the folded model's logits are from the
stock ones, and how far the stock ones are from themselves at another batch size: the noise floor,
written beside `--out` with `_logits` in its name.
`--model FOLDER` compares the logits of a real checkpoint too. `--tiny` is a rehearsal on CPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import gemma_fold
from benchmarks import run
from benchmarks.result import STOCK, Row, Settings
from gemma_fold.engines.transformers import layers

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
    STOCK: "the model as transformers has it",
    "copy": "the same again, copied: what being another model in the process costs",
    "folded": "gemma_fold.fold_model(model)",
    "unfused": "folded, every norm by itself",
}
#: What differs from transformers' defaults: `static` is the mode of that name.
GENERATE: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
STATIC = {"cache_implementation": "static", "compile_config.mode": "reduce-overhead"}
LOGIT_ROWS, LOGIT_TOKENS = 8, 256
MEASURES = {
    "ms_per_token": "milliseconds of a `generate`, over the tokens that it made",
    "ms_per_token_min": "the same",
    "ms_per_token_max": "the same",
    "kernels_per_token": "CUDA kernels that a decode step launches, eagerly",
}
DIVERGENCES = {
    "mean_kl": "mean Kullback-Leibler divergence from the other logits, in nats",
    "max_kl": "the largest",
    "max_abs": "largest difference of two logits",
    "same_top1": "share of positions with the same likeliest token",
}


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
    if name == STOCK:
        return stock
    if name == "copy":
        return copy.deepcopy(stock)
    model = gemma_fold.fold_model(copy.deepcopy(stock))
    if name == "unfused":
        layers.split_layers(model)
    return model


def generator(model: Any, ids: torch.Tensor, new: int, *, static: bool) -> Callable[[], Any]:
    options = {
        **GENERATE, "max_new_tokens": new, "min_new_tokens": new,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    if static:
        options["cache_implementation"] = STATIC["cache_implementation"]
        options["compile_config"] = transformers.CompileConfig(mode=STATIC["compile_config.mode"])
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


def time_decoding(models: dict[str, Any], args: argparse.Namespace) -> Iterator[Row]:
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
                values = {
                    "ms_per_token": round(statistics.median(per_token), 4),
                    "ms_per_token_min": round(min(per_token), 4),
                    "ms_per_token_max": round(max(per_token), 4),
                    "kernels_per_token": kernels(models[name], batch) if mode == "eager"
                    else None,
                }  # fmt: skip
                print(mode, batch, name, values, flush=True)
                yield Row({"mode": mode, "batch": batch}, name, values)


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


def compare_logits(name: str, stock: Any, folded: Any) -> Iterator[Row]:
    """Folded from stock, one by one and in a batch; and stock in a batch from stock one by one."""
    ids = prompt(stock, LOGIT_ROWS, LOGIT_TOKENS)
    rows = range(LOGIT_ROWS)
    with torch.no_grad():
        alone = [stock(ids[i : i + 1]).logits[0] for i in rows]
        native = [folded(ids[i : i + 1]).logits[0] for i in rows]
        together = list(stock(ids).logits)
        together_native = list(folded(ids).logits)
    case = {"model": name, "positions": LOGIT_ROWS * LOGIT_TOKENS}
    for impl, reference, other in (
        ("folded", alone, native),
        ("noise_floor", alone, together),
        ("folded_batched", together, together_native),
    ):
        yield Row(case, impl, divergence(reference, other))


def divergence(reference: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, float]:
    kl, largest, same = [], 0.0, 0
    for one, two in zip(reference, other, strict=True):
        p, q = (torch.log_softmax(x.double(), -1) for x in (one, two))
        kl.append((p.exp() * (p - q)).sum(-1))
        largest = max(largest, (one.float() - two.float()).abs().max().item())
        same += int((one.argmax(-1) == two.argmax(-1)).sum())
    every = torch.cat(kl)
    return {
        "mean_kl": every.mean().item(),
        "max_kl": every.max().item(),
        "max_abs": largest,
        "same_top1": same / every.numel(),
    }


def real_logits(folder: Path, device: str) -> Iterator[Row]:
    load = transformers.AutoModelForCausalLM.from_pretrained
    stock = load(folder, dtype=torch.bfloat16, device_map={"": device}).eval()
    folded = gemma_fold.fold_model(copy.deepcopy(stock))
    return compare_logits(folder.name, stock, folded)


def settings(shape: dict[str, Any], names: list[str]) -> Settings:
    """Of a run with these variants."""
    static = {f"{name} (static)": value for name, value in STATIC.items()}
    return Settings(
        both={"model": "gemma3_text, bfloat16, random weights", **shape, **GENERATE, **static},
        ours={name: VARIANTS[name] for name in names if name != STOCK},
    )


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small shape, few rounds")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[STOCK, "folded"])
    parser.add_argument(
        "--modes", nargs="+", choices=("eager", "static"), default=["eager", "static"]
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--model", type=Path, help="a real checkpoint whose logits to compare")
    run.add_options(parser)
    args = parser.parse_args()
    if args.tiny:
        args.new, args.rounds, args.warmup = 8, 2, 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = TINY if args.tiny else SHAPE
    stock = build(device, shape)
    models = {name: variant(stock, name) for name in dict.fromkeys([STOCK, *args.variants])}
    write = partial(
        run.write,
        args,
        machine=run.gpus(1),
        versions=run.versions("torch", "transformers", "triton"),
        settings=settings(shape, list(models)),
    )
    if "folded" in models:
        logits = list(compare_logits("random weights", stock, models["folded"]))
        if args.model:
            logits += real_logits(args.model, device)
        print(*logits, sep="\n", flush=True)
        out = args.out.with_stem(f"{args.out.stem}_logits")
        write("transformers_logits", measures=DIVERGENCES, rows=logits, out=out)
    rows: list[Row] = []
    for row in time_decoding(models, args):  # what a time limit cuts off is not lost
        rows.append(row)
        write("transformers", measures=MEASURES, rows=rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
