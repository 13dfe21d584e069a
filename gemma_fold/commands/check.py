"""`check`: did a converter get the +1 of every norm right?"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from gemma_fold.compare.files.arrays import open_arrays
from gemma_fold.compare.files.gguf_names import ARCHITECTURES, transformers_name
from gemma_fold.compare.files.model import NormFile, by_canonical_name, canonical
from gemma_fold.compare.files.opening import open_file
from gemma_fold.compare.offsets.evidence import Evidence, weigh
from gemma_fold.compare.offsets.expectation import (
    NormRule,
    Norms,
    expectation_line,
    expected_additions,
    find_norms,
    may_round,
)
from gemma_fold.compare.offsets.finding import Finding, NormCheck
from gemma_fold.compare.offsets.match import check_norm
from gemma_fold.compare.offsets.original import Catalogue, Original
from gemma_fold.compare.offsets.verdict import CheckVerdict, judge_evidence, judge_norms
from gemma_fold.compare.report.writers import plain
from gemma_fold.errors import CheckpointError, UsageError
from gemma_fold.format.arithmetic import Float32
from gemma_fold.rules.model import shorten
from gemma_fold.text import printable

_LONGEST_WORD = 40
#: Where the text model's own norms are; other parts, such as draft layers, may be left out whole.
_TEXT = ("layers", "norm", "final_norm", "hyper_connection_mixer")


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """A side of a check: `read` is the bytes that were read of its `size`."""

    name: str
    format: str
    tool: str
    model_type: str
    commit: str | None
    size: int
    read: int


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check` found.

    Attributes:
        file: what was checked.
        against: the original, if one was given.
        expectation: what the norms should hold, in words.
        norms: every norm beside the original's.
        evidence: what the file says alone, without an original.
        left_out: norms of the original in parts that the file does not have at all.
        notes: remarks for people.
        verdict: the answer.
    """

    file: CheckedFile
    against: CheckedFile | None
    expectation: str
    norms: tuple[NormCheck, ...]
    evidence: Evidence | None
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    verdict: CheckVerdict


def check(
    file: str | os.PathLike[str] | None = None,
    *,
    against: str | os.PathLike[str] | None = None,
    tensors: Collection[str] = (),
    expect: str | None = None,
) -> CheckReport:
    """Check the norms of `file`, a GGUF file, a folder of any tool, or a Hub id.

    Of either side only headers and norms are read.

    Args:
        file: what to check.
        against: the original; without it, only what the file itself shows is told.
        tensors: single norms instead of a file, as `NAME=FILE.npy` in float16, bfloat16, float32
            or float64; FILE is - for standard input.
        expect: "w" or "gamma", where the norms should hold that, whatever the format says.

    Raises:
        UsageError: arguments that make no sense together.
        CheckpointError: a side is damaged, incomplete, or no checkpoint.
        UnsupportedModelError: no rule says which norms are zero-centred.
        HostError: the Hub cannot be reached.
    """
    if (file is None) == (not tensors):
        raise UsageError("give a file to check, or single norms with --tensor NAME=FILE.npy")
    if expect not in (None, "w", "gamma"):
        raise UsageError(f"expect={expect!r} is neither w nor gamma")
    if tensors and against is None:
        raise UsageError("--tensor needs --against ORIGINAL to be compared with")
    given = open_arrays(tensors) if file is None else open_file(os.fspath(file))
    if against is None:
        return _alone(given, expect)
    return beside(given, open_file(os.fspath(against)), expect)


def _alone(file: NormFile, expect: str | None) -> CheckReport:
    norms = find_norms(file)
    found = file.values(list(norms.names.values()))
    values = {key: v for key, n in norms.names.items() if (v := found[n]) is not None}
    evidence = weigh(file.format, expect, norms.rules, values)
    return CheckReport(
        file=_described(file, norms.model_type, norms.names.values()),
        against=None,
        expectation=expectation_line(file.format, norms.rules, expect),
        norms=(),
        evidence=evidence,
        left_out=(),
        notes=(),
        verdict=judge_evidence(evidence),
    )


def beside(file: NormFile, original: NormFile, expect: str | None = None) -> CheckReport:
    """The norms of `file` beside those of `original`; otherwise as `check`."""
    norms = find_norms(original)
    originals = _originals(original, norms)
    names = _names_in(file, norms)
    parts = {_part(key) for key in names}
    missing = [key for key in norms.rules if key not in names]
    # Single tensors are those that were asked about; of a file, a part is there or it is not.
    absent = [
        key
        for key in missing
        if file.format != "tensors" and norms.rules[key].zero_centred and _part(key) in parts
    ]
    found = file.values(list(names.values()))
    catalogue = Catalogue(originals)
    checks = [
        _check_one(file, names[key], found[names[key]], original, catalogue, expect)
        for key, original in originals.items()
        if key in names
    ]
    checks += [_absent(norms.rules[key], file.format, expect) for key in absent]
    left_out = () if file.format == "tensors" else tuple(k for k in missing if k not in absent)
    model_type = str(file.config.get("model_type") or norms.model_type)
    return CheckReport(
        file=_described(file, model_type, names.values()),
        against=_described(original, norms.model_type, norms.names.values()),
        expectation=expectation_line(file.format, norms.rules, expect),
        norms=tuple(checks),
        evidence=None,
        left_out=left_out,
        notes=tuple(_notes(original, norms)),
        verdict=judge_norms(checks),
    )


def _originals(file: NormFile, norms: Norms) -> dict[str, Original]:
    values = file.values(list(norms.names.values()))
    found = {}
    for key, rule in norms.rules.items():
        name = norms.names[key]
        held = values[name]
        if held is None:
            raise CheckpointError(
                f"{name} of {file.name} is stored as {file.tensors[name].dtype}, which no norm of "
                "an original is; give the original checkpoint"
            )
        found[key] = Original(rule, held, expected_additions(file.format, rule))
    return found


def _names_in(file: NormFile, norms: Norms) -> dict[str, str]:
    """Canonical name -> the file's name, for norms of the original that it has."""
    if file.format != "tensors":
        held = by_canonical_name(file.tensors)
        return {key: held[key] for key in norms.rules if key in held}
    found = {}
    # The original's own names come first: elsewhere they may mean another norm.
    own = {canonical(name): key for key, name in norms.names.items()}
    known = {**{key: key for key in norms.rules}, **own}
    for name in file.tensors:
        key = next((known[k] for k in _spellings(name) if k in known), None)
        if key is None or key in found:
            problem = "is no norm of the original" if key is None else "is there twice"
            raise UsageError(f"--tensor {name} {problem}, which has {shorten(sorted(norms.rules))}")
        found[key] = name
    return found


def _spellings(name: str) -> list[str]:
    """What a name may be, said as transformers or as llama.cpp says it, with or without .weight."""
    full = name if name.endswith(".weight") else f"{name}.weight"
    return [canonical(full)] + [
        canonical(found)
        for arch, row in ARCHITECTURES.items()
        if (found := transformers_name(full, row, arch, {})) is not None
    ]


def _check_one(
    file: NormFile,
    name: str,
    values: Float32 | None,
    original: Original,
    catalogue: Catalogue,
    expect: str | None,
) -> NormCheck:
    tensor = file.tensors[name]
    expected = expected_additions(file.format, original.rule, expect)
    if values is None:
        found = NormCheck(
            name=original.rule.key,
            finding=Finding.UNREADABLE,
            expected=expected,
            elements=tensor.size,
            remark=f"stored as {tensor.dtype}",
        )
    else:
        found = check_norm(
            original,
            values,
            expected,
            catalogue,
            rounding_is_right=may_round(file.format),
            scaling_is_right=file.format == "safetensors" and bool(file.tool),
        )
    return replace(found, stored=tensor.stored, dtype=tensor.dtype)


def _absent(rule: NormRule, form: str, expect: str | None) -> NormCheck:
    expected = expected_additions(form, rule, expect)
    return NormCheck(
        name=rule.key, finding=Finding.ABSENT, expected=expected, remark="not in the file"
    )


def _part(key: str) -> str:
    first = key.split(".")[0]
    return "text" if first in _TEXT else first


def _notes(original: NormFile, norms: Norms) -> list[str]:
    if original.format == "mlx" and any(
        expected_additions("mlx", rule) for rule in norms.rules.values()
    ):
        return [
            f"{original.name} holds gamma that MLX rounded: what differs may be right; "
            "give the original checkpoint"
        ]
    return []


def _described(file: NormFile, model_type: str, names: Collection[str]) -> CheckedFile:
    norms = sum(file.tensors[name].length for name in set(names))
    return CheckedFile(
        file.name,
        file.format,
        _word(file.tool),
        _word(model_type),
        file.commit,
        file.size,
        file.header_bytes + norms,
    )


def _word(text: str) -> str:
    """What a file says of itself, which could be a report of its own."""
    return printable(text[:_LONGEST_WORD], one_line=True)


def to_json(report: CheckReport) -> dict[str, Any]:
    """Plain values for `check --json`. NaN and infinity become null."""
    value = asdict(report)
    value["norms"] = [
        {k: v.value if isinstance(v, Enum) else v for k, v in norm.items()}
        for norm in value["norms"]
    ]
    return {"right": report.verdict.right, **plain(value)}
