"""A row's bits do not depend on the rows beside it: every operator on rows, in batches of any size.

The oracle is the row by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from norm_checks import gamma, rows, split, table
from torch import Tensor

from gemma_fold import ops

EPS = 1e-6
HEADS = 4
#: Rows of `x` and of `residual`, [n, H], to rows of what an operator returns.
Form = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def forms(hidden: int, device: str) -> dict[str, Form]:
    """Every operator that norms rows of `hidden`, by name; heads have a quarter of that."""
    post, pre = gamma(hidden, 3, device), gamma(hidden, 4, device)
    size = hidden // HEADS
    q_gamma, k_gamma = gamma(size, 5, device), gamma(size, 6, device)
    cos_sin = table(64, size // 2 * 2, torch.float32, device)

    def in_place(write: Callable[..., None], *rest: object) -> Form:
        def run(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
            written = x.clone(), residual.clone()
            write(*written, *rest)
            return written

        return run

    def heads(x: Tensor) -> tuple[Tensor, Tensor]:
        parts = split(x.clone(), 1, (HEADS, -1))
        return parts[:, :3], parts[:, 3:]

    def qk(x: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        q, k = heads(x)
        ops.qk_rms_norm(q, k, q_gamma, k_gamma, EPS)
        return q, k

    def qk_rope(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        q, k = heads(x)
        positions = residual[:, 0].float().abs().long() % 64  # it goes where its row goes
        ops.qk_rms_norm_rope(q, k, q_gamma, k_gamma, cos_sin, positions, EPS)
        return q, k

    both = (post, pre, EPS, EPS)
    return {
        "rms_norm": lambda x, _: (ops.rms_norm(x, post, EPS),),
        "rms_norm of heads": lambda x, _: (ops.rms_norm(heads(x)[0], q_gamma, EPS),),
        "add_rms_norm": lambda x, residual: ops.add_rms_norm(x, residual, pre, EPS),
        "add_rms_norm_": in_place(ops.add_rms_norm_, pre, EPS),
        "rms_norm_add_rms_norm": lambda x, r: ops.rms_norm_add_rms_norm(x, r, *both),
        "rms_norm_add_rms_norm_": in_place(ops.rms_norm_add_rms_norm_, *both),
        "qk_rms_norm": qk,
        "qk_rms_norm_rope": qk_rope,
    }


def check_rows_alone(
    hidden: int, dtype: torch.dtype, device: str, most: int, sizes: Iterable[int]
) -> None:
    """`most` rows at once, in batches of each of `sizes` and in another order: the same bits."""
    x, residual = (rows((most, hidden), dtype, seed, device) for seed in (1, 2))
    order = torch.randperm(most, generator=torch.Generator().manual_seed(7)).to(device)
    for name, form in forms(hidden, device).items():
        whole = form(x, residual)
        assert any(part.any() for part in whole)
        for got, want in zip(form(x[order], residual[order]), whole, strict=True):
            assert torch.equal(got, want[order]), f"{name}: another order"
        for size in sizes:
            for start in {0, most // 2, most - size} & {*range(most - size + 1)}:
                rows_of = slice(start, start + size)
                for got, want in zip(form(x[rows_of], residual[rows_of]), whole, strict=True):
                    assert torch.equal(got, want[rows_of]), f"{name}: {size} rows from {start}"
