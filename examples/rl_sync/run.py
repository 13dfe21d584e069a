"""Train with transformers, push into a running engine at every step, and print the gap.

    python examples/rl_sync/run.py gemma-3-270m --engine vllm --python .venvs/vllm/bin/python
    python examples/rl_sync/run.py gemma-3-270m --engine sglang --python .venvs/sglang/bin/python

MODEL is an original checkpoint with norms of Gemma 3. Weights are pushed folded and raw in turns.
Exit code 1: in native mode, the norms of the two are not bit for bit the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import recorder
import rollout
import torch
import transformers
from trainer import Form, Trainer

from gemma_fold import convert

TEXTS = ("The capital of France is", "Water boils at")
COUNT = 4


def steps(
    trainer: Trainer, engine: rollout.Rollout, args: argparse.Namespace, folder: Path
) -> Iterator[dict[str, Any]]:
    """What was found after each update."""
    for step in range(args.steps):
        answers = engine.call("sample", args.prompts, COUNT, args.tokens, step)
        reward = trainer.step(args.prompts, answers)
        form: Form = "raw" if args.mode == "stock" or step % 2 else "folded"
        file = folder / "pushed.bin"
        torch.save(trainer.tensors(form), file)
        engine.call("update", str(file))
        ids = [*args.prompts[0], *(token for token, _ in answers[0][0])]
        said = engine.call("score", ids)
        explained = trainer.explain(ids, said, recorder.recorded(folder))
        ((again,),) = engine.call("sample", args.prompts[:1], 1, args.tokens, step)
        with torch.no_grad():
            own = trainer.logprobs([*args.prompts[0], *(token for token, _ in again)]).tolist()
        sampled = max(
            abs(logprob - one) for (_, logprob), one in zip(again, own[-len(again) :], strict=True)
        )
        yield {
            "update": step + 1,
            "form": form,
            "reward": reward,
            "sampled": sampled,
            **asdict(explained),
        }


def line(found: dict[str, Any]) -> str:
    return (
        f"update {found['update']}, pushed {found['form']}: largest gap of a log-probability "
        f"{found['sampled']:.2e} as sampled, {found['whole']:.2e} in one pass\n"
        f"    norms of q and k, from the rollout's inputs, and the last norm: {found['norms']} + "
        f"{found['states']} of {found['compared']} values differ\n"
        f"    with the rollout's attention and feed-forward blocks in the trainer, the gap is "
        f"{found['blocks']:.2e}: what the head's product adds"
    )


def add_run(
    file: Path, args: argparse.Namespace, versions: dict[str, str], found: list[dict[str, Any]]
) -> None:
    """Add a run to those in `file`, or put it in the place of one of the same kind."""
    about = {"engine": args.engine, "mode": args.mode, "model": args.model.resolve().name}
    runs = json.loads(file.read_text()) if file.exists() else []
    kept = [run for run in runs if any(run[key] != value for key, value in about.items())]
    text = ",\n".join(
        json.dumps(run) for run in [*kept, {**about, "versions": versions, "updates": found}]
    )
    file.write_text(f"[\n{text}\n]\n")


def prompts(model: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return [tokenizer(text).input_ids for text in TEXTS]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--engine", choices=("vllm", "sglang"), required=True)
    parser.add_argument("--python", default=sys.executable, help="that the engine is installed in")
    parser.add_argument("--mode", choices=rollout.MODES, default="native")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=12, help="of each answer")
    parser.add_argument("--json", type=Path, help="add what was found to this list of runs")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="rl-sync-") as name:
        folder = Path(name)
        folded = folder / "folded"
        convert(args.model, folded)
        served = args.model.resolve() if args.mode == "stock" else folded
        args.prompts = prompts(args.model)
        with rollout.running(args.engine, args.mode, args.python, served, folder) as engine:
            start = time.perf_counter()
            print(f"{args.engine}, {args.mode}: {args.steps} updates of {args.model}", flush=True)
            versions = engine.call("versions") | {"transformers": transformers.__version__}
            found = []
            for one in steps(Trainer(folded), engine, args, folder):
                found.append(one)
                print(line(one), flush=True)
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
    if args.json:
        add_run(args.json, args, versions, found)
    exact = all(one["norms"] == one["states"] == 0 for one in found)
    return 0 if exact or args.mode == "stock" else 1


if __name__ == "__main__":
    sys.exit(main())
