"""Compare all logits of two checkpoints that transformers runs, one after the other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma_fold._version import __version__
from gemma_fold.checkpoint.progress import Progress
from gemma_fold.compare.outputs.logits_file import LogitsFile, LogitsWriter
from gemma_fold.compare.outputs.results import (
    Continuation,
    Distribution,
    Outputs,
    OutputStats,
    first_difference,
)
from gemma_fold.compare.outputs.stats import Rows, compare_rows, join, noisiest, summarize
from gemma_fold.compare.outputs.tokens import NothingInCommonError, Tokens
from gemma_fold.compare.outputs.transformers import Model, running
from gemma_fold.compare.sides import Side
from gemma_fold.errors import UsageError

#: Tokens a window, and windows, of the batches that measure the noise floor. Several sizes, because
#: matrix products give the same bits at sizes for which the same kernel is chosen.
_FLOOR_LENGTHS, _FLOOR_WINDOWS = (256, 32), 8
#: Tokens of a window that are decoded one at a time, on a CPU. On a GPU all are: there other
#: kernels are chosen for it, and differences grow along a window.
_FLOOR_DECODED = 48
_STEP = 128


@dataclass(frozen=True, slots=True)
class Settings:
    """How outputs are compared; see the options of `gemma-fold diff`."""

    dtype: str
    device: torch.device
    new_tokens: int
    noise_floor: bool = True
    save_logits: Path | None = None
    logits: LogitsFile | None = None


def compare_full(
    a: Side, b: Side, tokens: Tokens, settings: Settings, progress: Progress
) -> Outputs:
    """Run A (or read its saved logits), then B, and compare every logit.

    Both run in the dtype of A. Memory holds one model and the logits of one window; A's logits lie
    in a temporary file. Raises UsageError, UnsupportedModelError or HostError.
    """
    progress.start_steps(len(tokens.windows) * (1 if settings.logits else 2), 2)
    with tempfile.TemporaryDirectory(prefix="gemma-fold-diff-") as folder:
        if settings.logits is not None:
            file = settings.logits
        else:
            path = settings.save_logits or Path(folder) / "logits.safetensors"
            file = _run_a(a, tokens, settings, path, progress)
        rows, greedy, engine_b = _run_b(b, tokens, settings, file, progress)
    progress.finish()
    made = file.metadata
    floor = _stats_from_json(made["floor"]) if made["floor"] else None
    return Outputs(
        stats=summarize(rows, vocabulary=file.shape[1]),
        floor=floor,
        floor_how=made["floor_how"],
        greedy=_continuations(tokens, made["greedy"], greedy),
        text=tokens.origin,
        windows=len(tokens.windows),
        context=len(tokens.windows[0]),
        engines=(made["engine"], engine_b),
        kl=(rows.kl_ab, np.asarray(made["floor_kl"]) if floor else None),
    )


def _run_a(
    side: Side, tokens: Tokens, settings: Settings, path: Path, progress: Progress
) -> LogitsFile:
    with (
        LogitsWriter(path, tokens.windows) as writer,
        running(side, settings.dtype, settings.device) as model,
    ):
        for number, window in enumerate(tokens.windows, 1):
            progress.file(f"A, window {number}", 1)
            writer.append(model.logits((window,))[0])
            progress.advance(1)
        floor = None
        if settings.noise_floor:
            floor = _noise_floor(model, writer.read(), tokens, settings.device)
        greedy = [model.continue_greedily(p.ids, settings.new_tokens) for p in tokens.prompts]
        vocabulary = writer.read().shape[1]
        return writer.finish(
            {
                "version": __version__,
                "name": side.name,
                "commit": side.commit,
                "model": fingerprint(side),
                "tokens": tokens.digest,
                "dtype": model.dtype,
                "engine": engine_name(model, settings.device),
                "greedy": greedy,
                "floor": floor and dataclasses.asdict(summarize(floor[0], vocabulary=vocabulary)),
                "floor_how": floor[1] if floor else "",
                "floor_kl": [float(f"{kl:.3g}") for kl in floor[0].kl_ab] if floor else None,
            }
        )


def _run_b(
    side: Side, tokens: Tokens, settings: Settings, file: LogitsFile, progress: Progress
) -> tuple[Rows, list[tuple[int, ...]], str]:
    parts = []
    with running(side, file.metadata["dtype"], settings.device) as model:
        for number, window in enumerate(tokens.windows):
            progress.file(f"B, window {number + 1}", 2)
            parts.append(_compare_window(model, window, file, number * len(window)))
            progress.advance(1)
        greedy = [model.continue_greedily(p.ids, settings.new_tokens) for p in tokens.prompts]
        return join(parts), greedy, engine_name(model, settings.device)


def _compare_window(model: Model, window: Sequence[int], file: LogitsFile, first: int) -> Rows:
    logits = model.logits((tuple(window),))[0]
    if logits.shape[-1] != file.shape[1]:
        raise NothingInCommonError(
            f"A gives {file.shape[1]} logits a position and B {logits.shape[-1]}: their "
            "vocabularies differ; compare weights with --no-outputs"
        )
    return _compare_with_file(logits, window[1:], file, first)


def _compare_with_file(
    logits: torch.Tensor, following: Sequence[int], file: LogitsFile, first: int
) -> Rows:
    """Rows of A in the file, from `first`, against `logits` [tokens, vocabulary].

    `following`: the token after each; the last may have none.
    """
    tokens = len(logits)
    targets = torch.tensor([*following, -1][:tokens], device=logits.device)
    parts = []
    for start in range(0, tokens, _STEP):
        end = min(start + _STEP, tokens)
        kept = file.rows(first + start, first + end).to(logits.device)
        parts.append(compare_rows(kept, logits[start:end], targets[start:end]))
    return join(parts)


def _noise_floor(
    model: Model, file: LogitsFile, tokens: Tokens, device: torch.device
) -> tuple[Rows, str]:
    """A against itself at other batch sizes: the one at which it differs most."""
    lengths = dict.fromkeys(min(n, len(tokens.windows[0])) for n in _FLOOR_LENGTHS)
    found = [_in_one_batch(model, file, tokens, length) for length in lengths]
    kept = len(tokens.windows[0])
    if device.type == "cpu":
        kept = min(kept, _FLOOR_DECODED)
    decoded = _token_by_token(model, file, tokens, kept)
    found += [decoded] if decoded else []
    return noisiest(found)


def _in_one_batch(model: Model, file: LogitsFile, tokens: Tokens, kept: int) -> tuple[Rows, str]:
    """The first `kept` tokens of all windows in one batch, against the windows one by one."""
    length = len(tokens.windows[0])
    chosen = list(enumerate(tokens.windows))[:_FLOOR_WINDOWS]
    if len(chosen) == 1:
        chosen *= 2
    logits = model.logits(tuple(window[:kept] for _, window in chosen))
    return _against_itself(logits, chosen, file, length), (
        f"A again, {len(chosen)} windows of {kept} tokens in one batch instead of one by one"
    )


def _token_by_token(
    model: Model, file: LogitsFile, tokens: Tokens, kept: int
) -> tuple[Rows, str] | None:
    """The first `kept` tokens of all windows decoded, against the windows as a whole."""
    length = len(tokens.windows[0])
    chosen = list(enumerate(tokens.windows))[:_FLOOR_WINDOWS]
    steps = model.logits_by_token(tuple(window[:kept] for _, window in chosen))
    parts = [
        _compare_with_file(row, window[at + 1 : at + 2], file, number * length + at)
        for at, logits in enumerate(steps)
        for row, (number, window) in zip(logits, chosen, strict=True)
    ]
    how = f"A again, {kept} tokens of {len(chosen)} windows decoded one at a time"
    return (join(parts), how) if parts else None


def _against_itself(
    logits: torch.Tensor,
    chosen: Sequence[tuple[int, Sequence[int]]],
    file: LogitsFile,
    length: int,
) -> Rows:
    """Rows of the file against `logits` [windows, tokens, vocabulary] of the chosen windows."""
    kept = logits.shape[1]
    return join(
        [
            _compare_with_file(rows, window[1:kept], file, number * length)
            for rows, (number, window) in zip(logits, chosen, strict=True)
        ]
    )


def _continuations(
    tokens: Tokens, a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]
) -> tuple[Continuation, ...]:
    """Continuations of the prompts, compared token by token."""
    return tuple(
        Continuation(
            prompt.text or tokens.text(prompt.ids),
            max(len(one), len(two)),
            first_difference(one, two),
            tokens.text(tuple(one)),
            tokens.text(tuple(two)),
        )
        for prompt, one, two in zip(tokens.prompts, a, b, strict=False)
    )


def engine_name(model: Model, device: torch.device) -> str:
    """What ran a model, in words."""
    return f"transformers, {model.dtype} on {device}"


def open_logits(path: Path, side: Side, tokens: Tokens, dtype: str) -> LogitsFile:
    """The logits that `--save-logits` kept.

    Raises:
        CheckpointError: there are none.
        UsageError: they are not those of `side`, over these tokens, in this dtype.
    """
    file = LogitsFile.open(path)
    file.check(tokens=tokens.digest, model=fingerprint(side), dtype=dtype)
    floor = file.metadata.get("floor")
    if floor and floor.keys() != OutputStats.__dataclass_fields__.keys():
        made = file.metadata.get("version")
        raise UsageError(f"{path} is of gemma-fold {made}; make it again with --save-logits")
    return file


def fingerprint(side: Side) -> str:
    """sha256 of config and weight headers: another model has another one."""
    digest = hashlib.sha256(json.dumps(side.config, sort_keys=True).encode())
    for name, header in sorted(side.headers.items()):
        digest.update(name.encode() + b"\0" + header.raw)
    return digest.hexdigest()


def _stats_from_json(value: dict[str, Any]) -> OutputStats:
    kls = {
        key: Distribution(**{**value[key], "percentiles": tuple(value[key]["percentiles"])})
        for key in ("kl_ab", "kl_ba")
    }
    pairs = {key: tuple(value[key]) for key in ("invalid", "unlisted")}
    return OutputStats(**{**value, **kls, **pairs})
