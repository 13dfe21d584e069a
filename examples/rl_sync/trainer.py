"""The trainer: a folded transformers model, GRPO-like steps, its pushes, and a gap explained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import recorder
import torch
from torch import Tensor

import gemma_fold
from gemma_fold.engines.transformers.norms import FoldedNorm
from gemma_fold.engines.weights import fold, unfold

Form = Literal["folded", "raw"]
Answer = list[tuple[int, float]]
Recorded = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Explained:
    """A gap of log-probabilities, taken apart.

    Attributes:
        whole: the largest gap, trainer against rollout.
        norms: values that the norms of the trainer make otherwise, from the rollout's inputs.
        compared: how many values that is of.
        blocks: the largest gap if attention and feed-forward blocks are the rollout's: what is left
            of the trainer then is embedding, norms and residual adds, and the head.
        states: values of the last norm that then differ. If none do, `blocks` is the head's product
            alone, and all between `whole` and `blocks` comes from the blocks.
    """

    whole: float
    norms: int
    compared: int
    blocks: float
    states: int


class Trainer:
    """A folded model that is trained; its embedding, which is the head too, is left alone."""

    def __init__(self, folder: Path, rate: float = 1e-4) -> None:
        self.model: Any = gemma_fold.load(str(folder), dtype="bfloat16").train()
        self.model.get_input_embeddings().weight.requires_grad_(False)
        trained = [one for one in self.model.parameters() if one.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)

    def logprobs(self, ids: list[int]) -> Tensor:
        """Of every token after the first, float32."""
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return _taken(logits, ids)

    def step(self, prompts: list[list[int]], answers: list[list[Answer]]) -> float:
        """One step on the answers to each prompt, better ones made likelier; the mean reward."""
        rewards = torch.tensor([[_reward(one) for one in group] for group in answers])
        better = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        count = rewards.numel()
        for prompt, group, advantages in zip(prompts, answers, better, strict=True):
            for answer, advantage in zip(group, advantages, strict=True):
                new = self.logprobs([*prompt, *(token for token, _ in answer)])[-len(answer) :]
                old = torch.tensor([logprob for _, logprob in answer])
                (-(advantage * torch.exp(new - old)).mean() / count).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(rewards.mean())

    def tensors(self, form: Form) -> dict[str, Tensor]:
        """What is pushed: gammas as float32 [H, 1], or raw weights as float32 [H].

        Raw weights can not hold the last bits of every gamma; the trainer goes on with what they
        fold to, so that both sides have the same.
        """
        norms = {
            f"{name}.{module.gain_name}": module
            for name, module in self.model.named_modules()
            if isinstance(module, FoldedNorm)
        }
        found = {}
        for name, parameter in self.model.named_parameters():
            value = parameter.detach()
            if form == "raw" and name in norms:
                offset = norms[name].fold.offset
                raw = unfold(value.view(-1), offset, torch.float32)
                value.copy_(fold(raw, offset)[:, None])
                found[name] = raw
            else:
                found[name] = value.clone()
        return found

    @torch.no_grad()
    def explain(self, ids: list[int], said: list[float], recorded: Recorded) -> Explained:
        """The gap to what a rollout said of `ids`, whose modules made what was recorded."""
        told = torch.tensor(said)
        own = self.logprobs(ids)
        norms = compared = 0
        for name, one in recorded.items():
            if "x" in one:
                norms += _differing(self.model.get_submodule(name)(one["x"]), one["y"])
                compared += one["y"].numel()
        with self._blocks_of(recorded):
            states = self.model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        last = recorded[recorder.LAST_NORM]["y"]
        rest = _taken(self.model.lm_head(states), ids)
        return Explained(
            whole=float((own - told).abs().max()),
            norms=norms,
            compared=compared + last.numel(),
            blocks=float((rest - told).abs().max()),
            states=_differing(states, last),
        )

    @contextmanager
    def _blocks_of(self, recorded: Recorded) -> Iterator[None]:
        """Attention and feed-forward blocks give what those of the rollout gave."""
        hooks = []
        for name, one in recorded.items():
            if name.endswith(recorder.BLOCKS) or name == recorder.EMBEDDING:
                hooks.append(
                    self.model.get_submodule(name).register_forward_hook(_giving(one["y"]))
                )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _giving(y: Tensor) -> Any:
    def give(module: Any, args: Any, output: Any) -> Any:
        return (y[None], *output[1:]) if isinstance(output, tuple) else y[None]

    return give


def _taken(logits: Tensor, ids: list[int]) -> Tensor:
    every = logits[:-1].float().log_softmax(-1)
    return every.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def _differing(found: Tensor, expected: Tensor) -> int:
    return int((found.flatten() != expected.flatten()).sum())


def _reward(answer: Answer) -> float:
    """How many of its tokens have an even number: a task for any model, with any vocabulary."""
    return sum(token % 2 == 0 for token, _ in answer) / len(answer)
