"""What the picture of zero-centred norms and the answer to "is it faster?" are made of."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.report import faster, number_lines

ROOT = Path(__file__).resolve().parent.parent


def test_numbers_of_the_picture_are_rounded_as_bf16_rounds() -> None:
    rng = np.random.default_rng(0)
    values = np.float32(1) + rng.normal(0, 0.02, 4096).astype(np.float32)
    ties = np.float32(1) + np.arange(-16, 16, dtype=np.float32) / 512
    for given in (values, ties, number_lines.followed()):
        expected = given.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(number_lines.bf16(given), expected)


def test_the_picture_counts_what_is_there() -> None:
    w = number_lines.followed().astype(ml_dtypes.bfloat16)
    one = ml_dtypes.bfloat16(1)
    text = number_lines.svg()
    assert f"{len(set((one + w).tolist()))} different gains of {len(w)}" in text
    assert f"{len(w)} different gains of {len(w)}" in text


def test_faster_counts_every_case_of_vllm_and_those_that_gain() -> None:
    cases = []
    for path in (ROOT / "benchmarks" / "results").glob("vllm_*.json"):
        found = json.loads(path.read_text())
        if found["what"] == "vllm":
            times: dict[str, dict[str, float]] = {}
            for row in found["rows"]:
                one = times.setdefault(json.dumps(row["case"]), {})
                one[row["impl"]] = row["values"]["ms_per_token"]
            cases += [one["gemma_fold"] < one["stock"] for one in times.values()]
    line = next(line for line in faster.faster().splitlines() if "**vLLM**" in line)
    said = re.search(r"in (\d+) of (\d+) cases", line)
    assert said is not None and said.groups() == (str(sum(cases)), str(len(cases)))
