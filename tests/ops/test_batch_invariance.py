"""A row has the same bits in every batch, in plain torch; test_kernels.py has the kernels."""

from __future__ import annotations

import pytest
import torch
from batch_checks import check_rows_alone


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("hidden", (64, 640))
def test_a_row_has_the_same_bits_in_every_batch(hidden: int, dtype: torch.dtype) -> None:
    check_rows_alone(hidden, dtype, "cpu", 256, (1, 2, 3, 17, 64, 255))
