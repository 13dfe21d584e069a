"""Counts what vLLM says differently in another batch, with VLLM_BATCH_INVARIANT=1, and times that.

    python -m benchmarks.batch_invariance --model-shape gemma3-4b --result NAME.json
    python -m benchmarks.batch_invariance --folder gemma-3-270m --result NAME.json   # real weights
    python -m benchmarks.batch_invariance --rehearse        # on a CPU, two small layers, no flag

Three engines live side by side, with the same options: native mode and stock, both with the flag,
and stock without it, which shows that differences would be seen. Each answers the same prompts by
themselves, in batches of up to 256, in other orders, with prompts cut into chunks where a batch
holds more tokens than a step takes, and with the prefix cache full of them. Every log-probability
is compared with that of the prompt by itself in the same engine. Then decode steps are timed, one
engine after the other in turns, as `benchmarks.vllm_decode` times them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import engines, model_shapes, run
from benchmarks.result import OURS, STOCK, Row
from benchmarks.vllm_decode import ENVIRONMENT, ON_CPU, PLUGIN, Child, wait

#: Stock vLLM without the flag.
FREE = "stock_without_flag"
FLAG, NO_FLAG = ({"VLLM_BATCH_INVARIANT": value} for value in "10")
SIDES = {OURS: OURS, STOCK: STOCK, FREE: STOCK}
MOST = 256
#: What a step takes: longer than any prompt, and far less than a batch of many.
STEP_TOKENS = 512
MEASURES = {
    "tokens": "output tokens compared with those of the same prompt by itself",
    "tokens_differing": "of these",
    "logprobs": "log-probabilities compared: of each token and of the likeliest others",
    "logprobs_differing": "of these, in any bit",
    "largest": "largest difference of a log-probability",
    "distinct_tokens": "how many different tokens were said so far",
    "ms_per_token": "milliseconds between two outputs that hold a token of every sequence",
    "ms_per_token_repeats": "the same, in each repeat",
}


def rounds(prompts: int, shuffles: int, most: int) -> Iterator[tuple[str, int, bool, list[int]]]:
    """How prompts are put together: a name, how many at once, whether uncached, their numbers.

    Where more are at once than there are prompts, each is there more than once.
    """
    numbers = list(range(prompts))
    yield "by itself", 1, True, numbers
    size = 2
    while size <= most:
        yield "together", size, True, numbers * max(1, size // prompts)
        size *= 2
    full = numbers * max(1, most // prompts)
    for seed in range(shuffles):
        shuffled = random.Random(seed).sample(full, len(full))
        yield f"in another order, {seed + 1}", most, True, shuffled
    for seed in range(shuffles):
        shuffled = random.Random(shuffles + seed).sample(full, len(full))
        yield f"with a full prefix cache, {seed + 1}", most, False, shuffled


def count(child: Child, args: argparse.Namespace, *, briefly: bool) -> Iterator[Row]:
    """One row for each way to put the prompts together. `briefly`: for a side that will differ."""
    shuffles = 1 if briefly else args.shuffles
    for how, size, fresh, numbers in rounds(args.prompts, shuffles, args.most):
        batches = [numbers[i : i + size] for i in range(0, len(numbers), size)]
        found = child.ask(do="say", batches=batches, output=args.output, fresh=fresh)
        if size > 1:
            print(f"{child.name}, {size} {how}: {found}", flush=True)
            yield Row(case(args, how, size), child.name, found)


def times(children: list[Child], args: argparse.Namespace) -> Iterator[Row]:
    """Decode steps, in turns."""
    found: dict[tuple[int, str], list[list[float]]] = {}
    for repeat in range(-1, args.repeats):
        for size in args.concurrency:
            for child in children:
                sizes = {"concurrency": size, "input": 32, "output": args.steps}
                gaps = child.ask(do="measure", seed=1000 * repeat + size, **sizes)["gaps"]
                if repeat >= 0:  # the first one warms up
                    found.setdefault((size, child.name), []).append(gaps)
    for (size, name), repeats in found.items():
        medians = [round(1e3 * statistics.median(gaps), 4) for gaps in repeats]
        every = [gap for gaps in repeats for gap in gaps]
        values = {
            "ms_per_token": round(1e3 * statistics.median(every), 4),
            "ms_per_token_repeats": medians,
        }
        print(f"{name}, {size} at once: {values}", flush=True)
        yield Row(case(args, "decode steps", size), name, values)


def case(args: argparse.Namespace, how: str, size: int) -> dict[str, Any]:
    """What a row is about."""
    return {"model": args.model, "layers": args.layers, "how": how, "at_once": size}


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """For `vllm.LLM`, beside the model's folder; the same for all three."""
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= args.most]
    options: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "seed": 0,
        "max_model_len": STEP_TOKENS,
        "max_num_seqs": args.most,
        "max_num_batched_tokens": STEP_TOKENS,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "enforce_eager": args.eager,
        "compilation_config": {"cudagraph_capture_sizes": sizes},
    }
    if args.folder is None:
        options["load_format"] = "dummy"
    if not args.rehearse:
        options["gpu_memory_utilization"] = args.memory
        # Engines that start at once would each count the others' memory as their own.
        options["kv_cache_memory_bytes"] = int(args.kv_cache_gib * 2**30)
        options["kernel_config"] = {"enable_flashinfer_autotune": False}
    return options


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model-shape", choices=model_shapes.NAMES, default="gemma3-4b")
    what.add_argument("--folder", type=Path, help="an original checkpoint instead")
    parser.add_argument("--layers", type=int, help="a shorter model of random weights")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--output", type=int, default=32, help="tokens after each prompt")
    parser.add_argument("--most", type=int, default=MOST, help="prompts at once")
    parser.add_argument("--shuffles", type=int, default=5, help="other orders, cached and not")
    parser.add_argument(
        "--concurrency", type=lambda s: [int(n) for n in s.split(",")], default=[1, 8, 32]
    )
    parser.add_argument("--steps", type=int, default=128, help="decode steps timed in a turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="no torch.compile, no CUDA graphs")
    parser.add_argument("--memory", type=float, default=0.3, help="of each engine, of a GPU")
    parser.add_argument("--kv-cache-gib", type=float, default=8.0, help="of each engine, on a GPU")
    parser.add_argument("--rehearse", action="store_true", help="small layers, on a CPU")
    run.add_options(parser, required=False)
    args = parser.parse_args()
    if args.rehearse:
        args.layers, args.most, args.eager = args.layers or 2, min(args.most, 8), True
    args.model = args.model_shape if args.folder is None else args.folder.resolve().name
    return args


def main() -> None:
    args = arguments()
    with engines.workplace() as (work, at_end):
        start = time.perf_counter()
        if args.folder is None:
            config = model_shapes.config(args.model_shape, args.layers, small=args.rehearse)
            model = model_shapes.write(config, work)
        else:
            model = args.folder.resolve()
        # A CPU has no kernels for the flag.
        flag, here = (NO_FLAG, ON_CPU) if args.rehearse else (FLAG, {})
        options, given = engine_options(args), ENVIRONMENT | here
        children = []
        for name, impl in SIDES.items():
            own = given | (NO_FLAG if name == FREE else flag)
            children.append(Child(impl, {"model": str(model), **options}, own, work, name))
            at_end.callback(children[-1].stop)
        about = wait(children)
        print(f"all engines up after {time.perf_counter() - start:.0f} s", flush=True)
        rows: list[Row] = []
        for child in children:
            rows += count(child, args, briefly=child.name == FREE)
            print(f"{child.name} counted after {time.perf_counter() - start:.0f} s", flush=True)
        rows += times(children, args)
        print(f"all done after {time.perf_counter() - start:.0f} s", flush=True)
        if args.out:
            sides = {STOCK: options, OURS: options}
            run.write(
                args,
                "batch_invariance",
                machine=run.gpus(1),
                versions=run.versions("torch", "triton", "vllm", "flashinfer"),
                settings=engines.settings(PLUGIN, given | flag, sides, about),
                measures=MEASURES,
                rows=rows,
            )


if __name__ == "__main__":
    main()
