"""safetensors folders and Hub repositories: whose they are, and their norms alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gemma_fold.checkpoint import hub
from gemma_fold.checkpoint.header import Header, TensorEntry
from gemma_fold.checkpoint.locate import hub_id
from gemma_fold.checkpoint.source import Checkpoint, open_checkpoint, read_tensor
from gemma_fold.compare.files.mlx_names import MARKS
from gemma_fold.compare.files.model import NormFile, Tensor
from gemma_fold.compare.sides import original_config

#: What quantizers leave beside a config.json that does not name them.
_TOOL_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
_THREADS = 8


def open_folder(source: str) -> NormFile:
    """A local folder, or a Hub id of which only headers and norms are fetched.

    Raises:
        CheckpointError: damaged, incomplete, or not a safetensors checkpoint.
        HostError: the Hub cannot be reached.
    """
    found = hub_id(source)
    if found is not None:
        return _remote(source, hub.fetch_headers(*found))
    return _local(source, open_checkpoint(source))


def _local(name: str, checkpoint: Checkpoint) -> NormFile:
    held = checkpoint.tensors()

    def read(names: Collection[str]) -> Mapping[str, bytes]:
        return {n: read_tensor(held[n][0], n) for n in names}

    texts = len(checkpoint.config_raw) + len(checkpoint.index_raw or b"")
    return _file(
        name,
        checkpoint.config,
        {file.name: file.header for file in checkpoint.weights},
        checkpoint.others,
        read,
        texts,
        checkpoint.origin.commit,
    )


def _remote(name: str, remote: hub.RemoteCheckpoint) -> NormFile:
    held = {t: file for file, header in remote.headers.items() for t in header.tensors}
    read_range = hub.open_ranges(remote)

    def read_one(tensor: str) -> bytes:
        header = remote.headers[held[tensor]]
        entry = header.tensors[tensor]
        start = header.data_start
        return read_range(held[tensor], start + entry.start, start + entry.end)

    def read(names: Collection[str]) -> Mapping[str, bytes]:
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(names, pool.map(read_one, names), strict=True))

    others = [file for file in remote.files if file not in remote.headers]
    return _file(name, remote.config, remote.headers, others, read, 0, remote.commit)


def _file(
    name: str,
    config: Mapping[str, Any],
    headers: Mapping[str, Header],
    others: Collection[str],
    read: Callable[[Collection[str]], Mapping[str, bytes]],
    texts: int,
    commit: str | None,
) -> NormFile:
    entries = {t.name: t for header in headers.values() for t in header.tensors.values()}
    base, folded = original_config(config, others, Path(os.path.basename(name)))
    form, tool = _form(config, headers, entries)
    tool = tool or next((_TOOL_FILES[file] for file in _TOOL_FILES if file in others), "")
    if folded:
        form, tool = "folded", "gemma-fold"
    tensors = {
        n: Tensor(n, t.dtype, t.shape[0])
        for n, t in entries.items()
        if _is_row(t) and not _is_mark(n)
    }
    header_bytes = texts + sum(8 + len(header.raw) for header in headers.values())
    size = sum(header.data_start + header.data_size for header in headers.values())
    return NormFile(name, form, tool, base, tensors, read, size, header_bytes, commit)


def _form(
    config: Mapping[str, Any], headers: Mapping[str, Header], entries: Mapping[str, TensorEntry]
) -> tuple[str, str]:
    """Which conventions a folder that is not folded follows, and what is known of its writer."""
    by_mlx = any((header.metadata or {}).get("format") == "mlx" for header in headers.values())
    settings = config.get("quantization")
    if by_mlx or (isinstance(settings, Mapping) and "group_size" in settings) or _is_mlx(entries):
        return "mlx", "MLX"
    return "safetensors", _quantizer(config) or _quantizer(config.get("text_config"))


def _quantizer(config: Any) -> str:
    quantized = config.get("quantization_config") if isinstance(config, Mapping) else None
    if not isinstance(quantized, Mapping) or not quantized:
        return ""
    method = quantized.get("quant_method")
    return method if isinstance(method, str) and method else "quantized"


def _is_mlx(entries: Mapping[str, TensorEntry]) -> bool:
    """By what MLX's conversion leaves of a convolution, whose channels it moves last."""
    return any(
        ".mlp.switch_mlp." in name
        or (name.endswith("linear_attn.conv1d.weight") and entry.shape[-1:] == (1,))
        for name, entry in entries.items()
    )


def _is_row(entry: TensorEntry) -> bool:
    """[H], or the [H, 1] of a folded norm."""
    return len(entry.shape) == 1 or (len(entry.shape) == 2 and entry.shape[1] == 1)


def _is_mark(name: str) -> bool:
    return any(mark in name for mark in MARKS)
