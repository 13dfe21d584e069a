"""`diff` of servers says "same" on evidence alone, "differs" on evidence, and else neither."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import run_here
from logprob_server import LogprobServer
from tokenizers_made import LETTERS, add_tokenizer
from transformers import PreTrainedTokenizerFast

from gemma_fold.compare import DiffLimits, DiffOptions, DiffReport, diff
from gemma_fold.compare.outputs.results import Outputs
from gemma_fold.compare.outputs.server import Position
from gemma_fold.compare.outputs.stats import compare_rows, summarize
from gemma_fold.compare.outputs.top_k import compare_positions
from gemma_fold.compare.report.verdict import judge
from gemma_fold.compare.report.writers import text, to_json

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    add_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"a": tiny.build("gemma3_text"), "other": tiny.build("gemma3_text", seed=1)}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(LETTERS[:50])
    return path


def tops(edit: Callable[[dict[str, float], str], Any]) -> Edit:
    """Changes every list of top tokens; `edit` is given the list and the token that follows."""

    def apply(logprobs: dict[str, Any]) -> None:
        lists = zip(logprobs["top_logprobs"], logprobs["tokens"], strict=True)
        logprobs["top_logprobs"] = [top and edit(top, token) for top, token in lists]

    return apply


def own(edit: Callable[[float], Any]) -> Edit:
    """Changes the log-probability of every token of the text, where it is given."""

    def apply(logprobs: dict[str, Any]) -> None:
        values = logprobs["token_logprobs"]
        logprobs["token_logprobs"] = [v if v is None else edit(v) for v in values]

    return apply


def without_token(top: dict[str, float], token: str) -> dict[str, float]:
    """The list as it is where servers do not add the token that follows to it."""
    return {name: p for name, p in top.items() if name != token}


def renamed(top: dict[str, float], token: str) -> dict[str, float]:
    """The same probabilities, of tokens that no other list has."""
    return {f"token_id:{1000 + int(n.split(':')[1])}": p for n, p in top.items()}


def peaked(first: int) -> Edit:
    """Lists of ten tokens from id `first` on, as sure as a trained model is of what it says."""
    odds = [0.7, *[0.01] * 9]
    listed = {f"token_id:{first + i}": math.log(p) for i, p in enumerate(odds)}
    return tops(lambda top, token: listed)


def both(one: Edit, two: Edit) -> Edit:
    def apply(logprobs: dict[str, Any]) -> None:
        one(logprobs)
        two(logprobs)

    return apply


def compare(
    models: dict[str, Any],
    tokenizer: Any,
    text_file: Path,
    edits: tuple[Edit | None, Edit | None],
    *,
    b: str = "a",
    **options: Any,
) -> DiffReport:
    with (
        LogprobServer(models["a"], tokenizer, edit=edits[0]) as one,
        LogprobServer(models[b], tokenizer, edit=edits[1]) as two,
    ):
        given = {"text": text_file, "prompts": 0, **options}
        return diff(one.url, two.url, DiffOptions(**given))


def outcome(report: DiffReport) -> str:
    verdict = report.verdict
    assert "\n" not in verdict.line and verdict.line.startswith(verdict.line.split(":")[0] + ": ")
    word = verdict.line.split(":")[0]
    assert (verdict.exit_code, verdict.same) == {
        "same": (0, True),
        "differs": (1, False),
        "not comparable": (2, False),
    }[word]
    return word


LIMITS = [DiffLimits(), DiffLimits(max_kl=1e-3)]
#: The last one is over the lower bounds of the KL here: it is other evidence that decides.
DIFFERENT = pytest.mark.parametrize(
    "limits", [*LIMITS, DiffLimits(max_kl=0.1)], ids=["noise floor", "max-kl", "lax"]
)


@DIFFERENT
@pytest.mark.parametrize(
    "edits",
    [
        (peaked(100), peaked(200)),
        (tops(without_token), both(tops(without_token), tops(renamed))),
        (None, tops(renamed)),
    ],
    ids=["sure", "unsure", "all but the token that follows"],
)
def test_lists_with_nothing_in_common_are_a_difference(
    models: dict[str, Any], tokenizer: Any, text_file: Path, edits: Any, limits: DiffLimits
) -> None:
    found = compare(models, tokenizer, text_file, edits, limits=limits)
    assert outcome(found) == "differs"


def test_another_model_with_other_lists_is_a_difference(
    models: dict[str, Any], tokenizer: Any, text_file: Path
) -> None:
    found = compare(models, tokenizer, text_file, (None, None), b="other")
    assert outcome(found) == "differs"
    assert found.outputs is not None and found.outputs.stats.same_top < 0.5


@DIFFERENT
def test_the_same_lists_with_a_far_perplexity_are_a_difference(
    models: dict[str, Any], tokenizer: Any, text_file: Path, limits: DiffLimits
) -> None:
    edit = both(tops(without_token), own(lambda p: p - 2))
    found = compare(models, tokenizer, text_file, (tops(without_token), edit), limits=limits)
    assert found.outputs is not None and found.outputs.stats.same_top == 1
    assert outcome(found) == "differs"


@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)], ids=["A", "B", "both"])
@pytest.mark.parametrize(
    ("edit", "missing"),
    [
        (tops(lambda top, token: {}), "no top tokens"),
        (tops(lambda top, token: None), "no top tokens"),
        (tops(lambda top, token: dict.fromkeys(top)), "not finite"),
        (tops(lambda top, token: top | {token: math.nan}), "not finite"),
        (tops(lambda top, token: top | {token: -math.inf}), "not finite"),
        (own(lambda p: None), "not finite"),
        (own(lambda p: math.nan), "not finite"),
        (own(lambda p: math.inf), "not finite"),
        (own(lambda p: -math.inf), "not finite"),
        (own(lambda p: -p), "over 0"),
        (tops(lambda top, token: {name: 0.0 for name in top}), "add up to more than 1"),
    ],
    ids=[
        "empty lists", "null lists", "null in lists", "NaN in lists", "-inf in lists",
        "null", "NaN", "inf", "-inf", "positive", "all sure",
    ],
)  # fmt: skip
def test_without_log_probabilities_there_is_no_verdict(
    models: dict[str, Any],
    tokenizer: Any,
    text_file: Path,
    sides: tuple[int, ...],
    edit: Edit,
    missing: str,
) -> None:
    edits = tuple(edit if side in sides else None for side in (0, 1))
    for limits in LIMITS:
        found = compare(models, tokenizer, text_file, edits, limits=limits)
        assert outcome(found) == "not comparable"
        assert missing in found.verdict.line and "; " in found.verdict.line
        assert all("AB"[side] in found.verdict.line for side in sides)


def test_one_position_is_too_few(models: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("x")
    found = compare(models, tokenizer, path, (None, None))
    assert outcome(found) == "not comparable"
    assert "1 position" in found.verdict.line and "--text" in found.verdict.line


def test_a_side_that_contradicts_itself_has_no_noise_floor(
    models: dict[str, Any], tokenizer: Any, text_file: Path
) -> None:
    answers = iter(range(1000))

    def another(logprobs: dict[str, Any]) -> None:
        peaked(100 * (1 + next(answers)))(logprobs)

    found = compare(models, tokenizer, text_file, (another, another))
    assert outcome(found) == "not comparable" and "asked again" in found.verdict.line


@pytest.mark.parametrize("limits", LIMITS, ids=["noise floor", "max-kl"])
@pytest.mark.parametrize("edit", [None, tops(without_token), peaked(100)])
def test_the_same_model_stays_the_same(
    models: dict[str, Any], tokenizer: Any, text_file: Path, edit: Edit | None, limits: DiffLimits
) -> None:
    found = compare(models, tokenizer, text_file, (edit, edit), limits=limits)
    assert outcome(found) == "same"


def test_a_little_noise_is_tolerated_where_it_is_allowed(
    models: dict[str, Any], tokenizer: Any, text_file: Path
) -> None:
    draw = np.random.default_rng(0)

    def noisy(logprobs: dict[str, Any]) -> None:
        own(lambda p: min(0.0, p + draw.normal(0, 1e-3)))(logprobs)
        tops(lambda top, t: {n: min(0.0, p + draw.normal(0, 1e-3)) for n, p in top.items()})(
            logprobs
        )

    found = compare(models, tokenizer, text_file, (None, noisy), limits=DiffLimits(max_kl=1e-3))
    assert outcome(found) == "same"
    assert outcome(compare(models, tokenizer, text_file, (None, noisy))) == "differs"
    # The floor is noise of the same kind, and a little more of it where A is noisier than B.
    found = compare(models, tokenizer, text_file, (noisy, noisy), limits=DiffLimits(max_kl=1e-3))
    assert outcome(found) == "same"


def test_a_shorter_list_is_reported_by_its_length(
    models: dict[str, Any], tokenizer: Any, text_file: Path
) -> None:
    def short(top: dict[str, float], token: str) -> dict[str, float]:
        return dict(sorted(top.items(), key=lambda item: -item[1])[:3])

    found = compare(models, tokenizer, text_file, (None, tops(short)))
    assert outcome(found) == "same" and "top 3 identical" in found.verdict.line


def test_the_command_exits_with_2(models: dict[str, Any], tokenizer: Any, text_file: Path) -> None:
    empty = tops(lambda top, token: {})
    with LogprobServer(models["a"], tokenizer, edit=empty) as server:
        command = ["diff", server.url, server.url, "--prompts", "0", "--text", text_file]
        shown, parsed = run_here(*command), run_here(*command, "--json")
    assert shown.returncode == parsed.returncode == 2
    assert shown.stdout.splitlines()[-1].startswith("not comparable: A and B list no top tokens")
    value = json.loads(parsed.stdout)
    assert value["same"] is False and value["comparable"] is False


# --- the bound -----------------------------------------------------------------------------------


def test_the_divergence_of_other_lists_is_bounded_from_below() -> None:
    """Against full distributions: never above the true divergence, and not zero."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 4.0):
        x, y = (scale * torch.randn(40, 60, generator=generator).double() for _ in range(2))
        x, y = x.log_softmax(-1), y.log_softmax(-1)

        def position(row: torch.Tensor) -> Position:
            best = row.topk(10)
            names = map(str, best.indices.tolist())
            return Position("7", float(row[7]), dict(zip(names, best.values.tolist(), strict=True)))

        rows = compare_positions([list(map(position, x))], [list(map(position, y))])
        for bound, p, q in ((rows.kl_ab, x, y), (rows.kl_ba, y, x)):
            true = (p.exp() * (p - q)).sum(-1).numpy()
            assert (bound <= true * (1 + 1e-9)).all() and (bound > 0).all()


def test_tokens_that_one_side_does_not_list_are_no_likelier_than_those_it_lists() -> None:
    def position(top: dict[str, float]) -> Position:
        return Position("t", math.log(0.05), {name: math.log(p) for name, p in top.items()})

    rows = compare_positions(
        [[position({"a": 0.7, "b": 0.2})]], [[position({"c": 0.7, "d": 0.2, "t": 0.05})]]
    )
    # Both lists hold 0.9, and what the other side gives those tokens is at most twice 0.2: search
    # it. "t" is as likely on both sides and adds nothing.
    free = np.linspace(1e-6, 0.4, 100_001)
    forward = 0.9 * np.log(0.9 / free) + 0.05 * np.log(0.05 / (0.95 - free))
    backward = free * np.log(free / 0.9) + (0.95 - free) * np.log((0.95 - free) / 0.05)
    expected = max(forward.min(), backward.min())
    assert expected > 0.9
    assert rows.kl_ab == pytest.approx(expected, rel=1e-6)
    assert rows.kl_ba == pytest.approx(expected, rel=1e-6)


# --- all logits ----------------------------------------------------------------------------------


def full(a: torch.Tensor, b: torch.Tensor) -> Outputs:
    rows = compare_rows(a, b, torch.zeros(len(a), dtype=torch.long))
    stats = summarize(rows, vocabulary=a.shape[1])
    return Outputs(stats, None, "", (), "", 1, len(a), ("", ""), (rows.kl_ab, None))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_on_both_sides_are_not_the_same(value: float) -> None:
    a = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    broken = a.clone()
    broken[3] = value
    for limits in LIMITS:
        verdict = judge(None, None, full(broken, broken.clone()), limits)
        assert verdict.exit_code == 2 and verdict.line.startswith("not comparable: ")
        verdict = judge(None, None, full(a, broken), limits)
        assert verdict.exit_code == 1 and "on one side only" in verdict.line
        assert judge(None, None, full(a, a.clone()), limits).same


def test_rows_that_are_masked_throughout_are_not_the_same() -> None:
    a = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    a[3] = -math.inf
    assert judge(None, None, full(a, a.clone()), DiffLimits()).exit_code == 2


def test_checkpoints_that_give_no_numbers(tmp_path: Path) -> None:
    model = tiny.build("gemma3_text", torch.bfloat16)
    model.save_pretrained(tmp_path / "good")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path / "broken")
    options = DiffOptions(outputs=True, prompts=1, new_tokens=4)
    found = diff(str(tmp_path / "broken"), str(tmp_path / "broken"), options)
    assert outcome(found) == "not comparable" and "not finite" in found.verdict.line
    assert json.loads(json.dumps(to_json(found), allow_nan=False))["comparable"] is False
    assert text(found).splitlines()[-1] == found.verdict.line
    # A difference of the weights needs no outputs.
    found = diff(str(tmp_path / "good"), str(tmp_path / "broken"), options)
    assert outcome(found) == "differs"


def test_a_checkpoint_that_gives_no_numbers_and_a_server(
    models: dict[str, Any], tokenizer: Any, tmp_path: Path, text_file: Path
) -> None:
    model = tiny.build("gemma3_text")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path / "broken")
    add_tokenizer(tmp_path / "broken")
    with LogprobServer(models["a"], tokenizer) as server:
        found = diff(
            str(tmp_path / "broken"),
            server.url,
            DiffOptions(outputs=True, text=text_file, prompts=1),
        )
    assert outcome(found) == "not comparable" and "A returns" in found.verdict.line
