"""GEMMA_FOLD: one variable, one reading of it, whatever the engine."""

from __future__ import annotations

import pytest

from gemma_fold.engines.mode import requested, requested_mode
from gemma_fold.errors import UsageError


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        ("native", "native"),
        ("stock", "stock"),
        ("Native", "native"),
        (" STOCK\n", "stock"),
        ("", None),
        ("  ", None),
    ],
)
def test_values(monkeypatch: pytest.MonkeyPatch, value: str, mode: str | None) -> None:
    monkeypatch.setenv("GEMMA_FOLD", value)
    assert requested_mode() == mode


def test_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMMA_FOLD", raising=False)
    assert requested_mode() is None


@pytest.mark.parametrize("value", ["fast", "Fast ", "native stock", "0"])
def test_another_value_is_refused_as_it_was_given(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("GEMMA_FOLD", value)
    with pytest.raises(UsageError) as refusal:
        requested_mode()
    assert str(refusal.value) == (
        f"invalid GEMMA_FOLD={value!r}: expected 'native', 'stock' or 'require'"
    )


def test_three_choices_read_as_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA_FOLD_QK", "fussed")
    with pytest.raises(UsageError, match=r"expected 'fused', 'inline' or 'separate'$"):
        requested("GEMMA_FOLD_QK", ("fused", "inline", "separate"))
