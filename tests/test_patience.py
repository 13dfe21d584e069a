"""Time-outs are stretched by how slow the machine is, and never cut short."""

from __future__ import annotations

import math

import patience
import pytest


@pytest.mark.parametrize(("works", "stretched"), [(3.0, 30.0), (0.5, 10.0)])
def test_a_time_out_is_stretched_on_a_slow_machine_alone(
    works: float, stretched: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_measured", (-math.inf, 1.0))
    monkeypatch.setattr(patience, "_work_seconds", lambda: works * patience._REFERENCE_SECONDS)
    assert patience.seconds(10) == pytest.approx(stretched)


def test_a_machine_that_was_slow_once_may_be_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_measured", (-math.inf, 4.0))
    monkeypatch.setattr(patience, "_work_seconds", lambda: patience._REFERENCE_SECONDS)
    assert patience.slowness() == 4.0


def test_work_is_measured_again_after_a_while_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(patience, "_measured", (-math.inf, 1.0))
    monkeypatch.setattr(patience, "_work_seconds", lambda: measured.append(1) or 0.1)
    patience.slowness(), patience.slowness()
    assert len(measured) == 1
    monkeypatch.setattr(patience, "_AGAIN_SECONDS", -1.0)
    patience.slowness()
    assert len(measured) == 2
