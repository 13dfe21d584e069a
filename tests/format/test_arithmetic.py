"""The arithmetic against float64, ml_dtypes and torch, over every 16-bit value there is."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gemma_fold.format.arithmetic import (
    count_rounded,
    decode,
    encode,
    find_exceptions,
    fold,
    unfold,
)
from gemma_fold.rules import Fold

RMS = Fold(norm="rms_norm")
STORAGE = Fold(norm="rms_norm", add_dtype="storage")
NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def as_bits(values: np.ndarray) -> np.ndarray:
    """View as integers, with all NaNs alike: NaN payloads are compared where they must be kept."""
    bits = values.view(np.uint16 if values.itemsize == 2 else np.uint32).copy()
    with np.errstate(invalid="ignore"):  # a signalling NaN
        bits[np.isnan(values.astype(np.float64))] = 0x7FFF
    return bits


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_decode_agrees_with_numpy_on_every_bit_pattern(dtype: str) -> None:
    with np.errstate(invalid="ignore"):
        expected = ALL_16_BITS.view(NUMPY[dtype]).astype(np.float32)
    np.testing.assert_array_equal(as_bits(decode(ALL_16_BITS.tobytes(), dtype)), as_bits(expected))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_encode_rounds_as_the_reference_libraries_do(dtype: str) -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    halfway = (np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    values = np.concatenate([values, halfway])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(NUMPY[dtype])
    found = np.frombuffer(encode(values, dtype), np.uint16).view(NUMPY[dtype])
    np.testing.assert_array_equal(as_bits(found), as_bits(expected))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("offset", [1.0, 1 / 5, 1 / 5**1.5])
def test_fold_is_the_rounded_exact_sum(dtype: str, offset: float) -> None:
    """float64 holds the sum of two such numbers exactly, or far beyond float32's rounding."""
    w = ALL_16_BITS.view(NUMPY[dtype])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (w.astype(np.float64) + np.float64(np.float32(offset))).astype(np.float32)
    found = fold(w.tobytes(), dtype, Fold(norm="rms_norm", offset=offset))
    np.testing.assert_array_equal(as_bits(found), as_bits(expected))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("offset", [1.0, 1 / 5, 1 / 5**1.5])
def test_fold_gives_the_bits_that_torch_gives(dtype: str, offset: float) -> None:
    """Both ways, NaN payloads included on the way there: nothing is lost for want of torch."""
    torch = pytest.importorskip("torch")
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    w = torch.from_numpy(ALL_16_BITS.view(np.int16).copy()).view(torch_dtype)
    gamma = w.float() + offset
    rule = Fold(norm="rms_norm", offset=offset)
    found = fold(ALL_16_BITS.tobytes(), dtype, rule)
    np.testing.assert_array_equal(found.view(np.uint32), gamma.numpy().view(np.uint32))
    back = (gamma - offset).to(torch_dtype).view(torch.int16).numpy().view(NUMPY[dtype])
    unfolded = np.frombuffer(unfold(found, dtype, rule), NUMPY[dtype])
    np.testing.assert_array_equal(as_bits(unfolded), as_bits(back))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_sum_in_the_storage_dtype_is_gamma_rounded_at_use(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    w = torch.from_numpy(ALL_16_BITS.view(np.int16).copy()).view(torch_dtype)
    expected = (w + 1).float().numpy()
    gamma = torch.from_numpy(fold(ALL_16_BITS.tobytes(), dtype, STORAGE))
    np.testing.assert_array_equal(as_bits(gamma.to(torch_dtype).float().numpy()), as_bits(expected))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rule", [RMS, STORAGE, Fold(norm="layer_norm", offset=1 / 5**1.5)])
def test_unfold_restores_every_bit_pattern(dtype: str, rule: Fold) -> None:
    if dtype == "F32":
        raw = np.random.default_rng(2).integers(0, 1 << 32, 100_000, dtype=np.uint32).tobytes()
    else:
        raw = ALL_16_BITS.tobytes()
    gamma = fold(raw, dtype, rule)
    exceptions = find_exceptions(raw, dtype, gamma, rule)
    assert unfold(gamma, dtype, rule, exceptions) == raw
    # Without the exceptions it must not come back, or the test would prove nothing.
    assert unfold(gamma, dtype, rule) != raw


def test_real_sized_weights_need_no_exceptions() -> None:
    w = np.random.default_rng(3).normal(0, 20, 10_000).astype(ml_dtypes.bfloat16)
    w = w[np.abs(w.astype(np.float32)) > 1e-3]
    assert find_exceptions(w.tobytes(), "BF16", fold(w.tobytes(), "BF16", RMS), RMS) is None


def test_few_exceptions_are_kept_sparsely() -> None:
    w = np.full(1000, 0.5, ml_dtypes.bfloat16)
    w[[3, 999]] = [1e-30, -0.0]
    found = find_exceptions(w.tobytes(), "BF16", fold(w.tobytes(), "BF16", RMS), RMS)
    assert found is not None and found.count == 2
    assert found.index == np.array([3, 999], "<u4").tobytes()


def test_count_rounded_counts_the_gammas_bf16_cannot_hold() -> None:
    gamma = np.array([1.0, 16.8125, 1.00390625, 2.0, np.nan, np.inf], np.float32)
    assert count_rounded(gamma, "BF16") == 2
    assert count_rounded(gamma, "F16") == 0
