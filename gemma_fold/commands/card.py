"""The model card of a folded checkpoint on the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_fold._version import __version__
from gemma_fold.checkpoint.source import Checkpoint, read_small, read_tensor
from gemma_fold.errors import CheckpointError
from gemma_fold.format.arithmetic import count_rounded, decode
from gemma_fold.format.manifest import Manifest
from gemma_fold.format.reader import folded_in
from gemma_fold.text import human_size

CARD = "README.md"
#: What the source's own card is called beside the new one.
SOURCE_CARD = "README.source.md"
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
_GATE = "extra_gated_"
_NOTICE = re.compile(r"(?:LICEN[CS]E|NOTICE|COPYING|USE_POLICY|TERMS)[^/]*", re.IGNORECASE)
_BLOCK = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Counts:
    """What folding changed.

    Attributes:
        norms: tensors that hold gamma.
        weights: in them.
        rounded: of these, how many a bf16 gamma would have changed.
        others: tensors whose bytes are the source's.
        size: bytes of those.
    """

    norms: int
    weights: int
    rounded: int
    others: int
    size: int


def count(checkpoint: Checkpoint, manifest: Manifest) -> Counts:
    """Count what folding changed, by the gammas as they are on the disk."""
    rounded = sum(
        count_rounded(decode(read_tensor(file, tensor.name), "F32"), "BF16")
        for file in checkpoint.weights
        for tensor in folded_in(file.header, manifest)
    )
    others = [e for n, (_, e) in checkpoint.tensors().items() if n not in manifest.tensors]
    return Counts(
        norms=len(manifest.tensors),
        weights=sum(tensor.shape[0] for tensor in manifest.tensors.values()),
        rounded=rounded,
        others=len(others),
        size=sum(entry.end - entry.start for entry in others),
    )


def metadata(path: Path) -> dict[str, Any]:
    """The metadata at the head of a model card; empty if there is none.

    Raises:
        CheckpointError: it is damaged, so that the source's licence is not known.
    """
    import yaml

    if not path.is_file():
        return {}
    found = _BLOCK.match(read_small(path).decode("utf-8", "replace"))
    try:
        values = yaml.safe_load(found[1]) if found else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the metadata of {path} cannot be read, and with it the licence; mend its head"
        ) from error
    return values if isinstance(values, dict) else {}


def card(
    manifest: Manifest,
    counts: Counts,
    source: Mapping[str, Any],
    notices: Sequence[str],
    *,
    repo_id: str,
    base_model: str | None,
) -> str:
    """The text of the card.

    Args:
        manifest: of the folded checkpoint.
        counts: what folding changed.
        source: metadata of the source's own card.
        notices: the source's files with its licence and notices.
        repo_id: where the card will be.
        base_model: the source on the Hub; None if it is not there.
    """
    import yaml

    head: dict[str, Any] = {k: source[k] for k in _KEPT if k in source}
    head |= {k: v for k, v in source.items() if isinstance(k, str) and k.startswith(_GATE)}
    if base_model is not None:
        # Of the relations that the Hub knows, conversions are listed under this one.
        head |= {"base_model": base_model, "base_model_relation": "quantized"}
    head |= {"library_name": "gemma-fold", "tags": ["gemma-fold", manifest.model_type]}
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    sections = (
        _title(manifest, base_model),
        _loading(repo_id),
        _changes(counts, manifest),
        _making(manifest),
        _licence(source, notices, base_model),
    )
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def as_source(
    checkpoint: Checkpoint, manifest: Manifest
) -> tuple[Checkpoint, Manifest, Mapping[str, str]]:
    """Both with the source's card under its own name, and where it lies: a push puts it aside."""
    found = manifest.files.get(SOURCE_CARD)
    if found is None or not was_pushed(checkpoint, manifest):
        return checkpoint, manifest, {}
    files = {n: f for n, f in manifest.files.items() if n != SOURCE_CARD}
    others = {n: s for n, s in checkpoint.others.items() if n != SOURCE_CARD}
    others[CARD] = checkpoint.others[SOURCE_CARD]
    files[CARD] = replace(found, name=CARD)
    return replace(checkpoint, others=others), replace(manifest, files=files), {CARD: SOURCE_CARD}


def was_pushed(checkpoint: Checkpoint, manifest: Manifest) -> bool:
    """Whether a card was written for the folded checkpoint."""
    return CARD in checkpoint.others and CARD not in manifest.files


def is_notice(name: str) -> bool:
    """Whether a file at the top of a checkpoint holds a licence or notices."""
    return _NOTICE.fullmatch(name) is not None


def _title(manifest: Manifest, base_model: str | None) -> str:
    name = _inline(base_model or manifest.origin.name)
    link = f"[{name}](https://huggingface.co/{base_model})" if base_model else f"`{name}`"
    commit = f" at commit `{manifest.origin.commit}`" if manifest.origin.commit else ""
    return (
        f"# {name}, folded\n\n"
        f"{link}{commit} with the norm weights stored as float32 gamma = 1 + w, where the original "
        "stores w and adds the 1 whenever it runs. The model is the same; a loader that does not "
        "know the format stops with an error instead of adding the 1 twice."
    )


def _loading(repo_id: str) -> str:
    return (
        "## Load it\n\n"
        "```python\n"
        "import gemma_fold  # pip install 'gemma-fold[transformers]'\n\n"
        f'model = gemma_fold.load("{repo_id}")  # a transformers model\n'
        "```\n\n"
        "```\n"
        f"vllm serve {repo_id}    # where gemma-fold is installed, without flags\n"
        f"python -m sglang.launch_server --model-path {repo_id}\n"
        "gemma-fold unfold FOLDER -o ORIGINAL    # the source's weights, byte for byte\n"
        "```"
    )


def _changes(counts: Counts, manifest: Manifest) -> str:
    form = "[H, 1]" if manifest.tensor_lock else "[H]"
    return (
        "## What is different from the original\n\n"
        "| | |\n|---|---|\n"
        f"| norms folded | {counts.norms:,}, as float32 of shape {form} |\n"
        f"| weights in them | {counts.weights:,} |\n"
        f"| of these, changed by the fold | 0; a bf16 gamma would change {counts.rounded:,} |\n"
        f"| all other tensors | {counts.others:,}, {human_size(counts.size)}, byte for byte |"
    )


def _making(manifest: Manifest) -> str:
    origin = manifest.origin
    source = f"{origin.repo_id}@{origin.commit}" if origin.repo_id and origin.commit else "SOURCE"
    lock = "" if manifest.tensor_lock else " --no-tensor-lock"
    return (
        "## How it was made\n\n"
        f"With gemma-fold {_inline(manifest.version)}, pushed with {__version__}:\n\n"
        "```\n"
        f"gemma-fold convert {source} -o FOLDER{lock}\n"
        "gemma-fold verify FOLDER\n"
        "```\n\n"
        "`gemma_fold.json` holds a digest of every byte of the source, with which `verify` proves "
        "this checkpoint and `unfold` what it gives back."
    )


def _licence(source: Mapping[str, Any], notices: Sequence[str], base_model: str | None) -> str:
    named = source.get("license_name") or source.get("license")
    where = f" of [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    lines = [f"The licence and the terms{where} hold for this form of it, too."]
    if isinstance(named, str):
        lines.append(f"Its card names the licence `{_inline(named)}`.")
    if notices:
        lines.append("Here as they came: " + ", ".join(f"`{_inline(n)}`" for n in notices) + ".")
    return "## Licence\n\n" + " ".join(lines)


def _inline(text: str) -> str:
    """Text from a file within a line of Markdown."""
    return re.sub(r"[^\w.@/ +-]", "", text)[:200]
