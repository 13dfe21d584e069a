"""A function's digest says whether its statements are those that were read."""

from __future__ import annotations

from gemma_fold.engines.known_code import bare_targets, statements_digest

PYTHON_3_10 = """\
(hidden, _) = self.attention(hidden)
for (i, layer) in enumerate(self.layers):
    (hidden, residual) = layer(hidden)
    (x,) = [(a, b) for (a, b) in zip(hidden, residual)]
    sizes = (hidden.shape, residual.shape)
"""
PYTHON_3_11 = """\
hidden, _ = self.attention(hidden)
for i, layer in enumerate(self.layers):
    hidden, residual = layer(hidden)
    x, = [(a, b) for a, b in zip(hidden, residual)]
    sizes = (hidden.shape, residual.shape)
"""


def test_every_python_gives_the_digest_of_the_newest() -> None:
    assert bare_targets(PYTHON_3_10) == bare_targets(PYTHON_3_11) == PYTHON_3_11


def written_one_way(x: int) -> int:
    first, second = x, 2  # a comment
    return first + second


def written_another_way(value: int) -> int:
    """A docstring counts, a layout does not."""
    first, second = value, 2
    return first + second


def written_as_the_first(x: int) -> int:
    (first, second) = (x, 2)

    return (first
            + second)  # fmt: skip


def test_layout_does_not_count_and_statements_do() -> None:
    assert statements_digest(written_one_way) == statements_digest(written_as_the_first)
    assert statements_digest(written_one_way) != statements_digest(written_another_way)
    assert statements_digest(len) == statements_digest(None) == ""
