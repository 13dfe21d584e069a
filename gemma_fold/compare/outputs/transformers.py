"""Side A or B run by transformers, one model in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gemma_fold.compare.sides import Side
from gemma_fold.errors import (
    GemmaFoldError,
    HostError,
    UnsupportedModelError,
    UsageError,
    first_line,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")


def import_transformers() -> Any:
    """transformers, taught to load folded checkpoints. Raises HostError without it."""
    from gemma_fold.engines.transformers import install

    install()  # reports that transformers is missing
    return import_module("transformers")


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one. Raises UsageError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name} is not available ({first_line(error)}); use cpu, cuda or cuda:N"
        ) from None
    return device


class Model:
    """A loaded model; `running` makes and frees it."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self.dtype = str(_dtype_of(model)).removeprefix("torch.")
        #: What makes a prompt of an encoder-decoder the text its decoder continues.
        self._decodes_apart = bool(getattr(model.config, "is_encoder_decoder", False))

    def logits(self, windows: tuple[tuple[int, ...], ...]) -> Tensor:
        """Teacher-forced logits of windows of one length, as one batch.

        Returns [windows, length, vocabulary] on the model's device, in the dtype it gives.
        """
        ids = torch.tensor(windows, device=self._device)
        extra = {"decoder_input_ids": ids} if self._decodes_apart else {}
        out = self._call(self._model, input_ids=ids, use_cache=False, **extra)
        logits = getattr(out, "logits", None)
        if logits is None or logits.dim() != 3:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} gives no next-token logits; "
                "compare its weights with --no-outputs"
            )
        return logits  # type: ignore[no-any-return]

    def logits_by_token(self, windows: tuple[tuple[int, ...], ...]) -> Iterator[Tensor]:
        """Logits [len(windows), 1, vocabulary] of one token of every window after the other.

        That is how a server decodes. Nothing for a model that keeps no key-value cache, or that
        decodes apart from its prompt.
        """
        if self._decodes_apart:
            return
        ids = torch.tensor(windows, device=self._device)
        cache = None
        for token in torch.split(ids, 1, dim=1):
            out = self._call(self._model, input_ids=token, past_key_values=cache, use_cache=True)
            cache = getattr(out, "past_key_values", None)
            if cache is None:
                return
            yield out.logits

    def continue_greedily(self, ids: Sequence[int], tokens: int) -> tuple[int, ...]:
        """The most likely continuation of `ids`, token by token."""
        prompt = torch.tensor([ids], device=self._device)
        out = self._call(
            self._model.generate,
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=1,
            top_k=None,
            top_p=None,
            temperature=None,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        start = 1 if self._decodes_apart else prompt.shape[1]
        return tuple(int(i) for i in out[0, start:])

    def close(self) -> None:
        """Free the memory, whoever still holds this object."""
        self._model = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        try:
            with torch.inference_mode():
                return function(**arguments)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if _is_about_memory(error):
                raise
            raise UnsupportedModelError(
                f"{type(self._model).__name__} cannot be run on tokens alone "
                f"({first_line(error)}); compare its weights with --no-outputs"
            ) from error


@contextmanager
def running(side: Side, dtype: str, device: torch.device) -> Iterator[Model]:
    """Load the checkpoint of `side`, folded or original, and free it at the end.

    Raises:
        UnsupportedModelError: transformers cannot load it.
        HostError: memory runs out, during loading or later.
    """
    with explaining_memory(side.name, device):
        model = Model(_load(side, dtype, device), device)
        try:
            yield model
        finally:
            model.close()


@contextmanager
def explaining_memory(name: str, device: torch.device) -> Iterator[None]:
    """Turn each library's error for a lack of memory into one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(name, device) from error
    except RuntimeError as error:
        if _is_about_memory(error):
            raise _out_of_memory(name, device) from error
        raise


def _is_about_memory(error: BaseException) -> bool:
    text = str(error)
    return any(words in text for words in ("out of memory", "enough memory", "allocate memory"))


def _out_of_memory(name: str, device: torch.device) -> HostError:
    other = "another --device" if device.type == "cpu" else "--device cpu"
    return HostError(
        f"out of memory on {device} while {name} was run; try a smaller --context, "
        f"--dtype bfloat16 or {other}, or compare weights with --no-outputs"
    )


def _load(side: Side, dtype: str, device: torch.device) -> Any:
    transformers = import_transformers()
    architectures = side.config.get("architectures") or ["AutoModelForCausalLM"]
    cls = getattr(transformers, str(architectures[0]), None)
    if cls is None:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know {architectures[0]} of "
            f"{side.name}; upgrade it, or compare weights with --no-outputs"
        )
    try:
        with _without_progress_bars(transformers):
            model, info = cls.from_pretrained(
                side.root, dtype=_torch_dtype(dtype), output_loading_info=True
            )
        if missing := sorted(info["missing_keys"]):
            # transformers would go on with random weights.
            raise UnsupportedModelError(
                f"{side.name} lacks {len(missing)} weights that {architectures[0]} needs "
                f"({missing[0]}); get the complete checkpoint"
            )
        return model.to(device).eval()
    except (GemmaFoldError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if _is_about_memory(error):
            raise
        raise UnsupportedModelError(
            f"transformers does not load {side.name} ({first_line(error)}); "
            "compare its weights with --no-outputs"
        ) from error


@contextmanager
def _without_progress_bars(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _dtype_of(model: Any) -> torch.dtype:
    from gemma_fold.engines.transformers.weights import weights_dtype

    return weights_dtype(model)  # not that of a gamma


def _torch_dtype(name: str) -> Any:
    return "auto" if name == "auto" else getattr(torch, name)
