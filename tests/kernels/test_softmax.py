# SPDX-License-Identifier: Apache-2.0
"""Softmax, its normaliser and, through them, the exponential of the core."""

import numpy as np
import pytest
from float_cases import OFFSETS, SIZES, Float32, assert_same_bits, assert_targets_agree, poisoned

from ternaryforge import _core

pytestmark = pytest.mark.usefixtures("target")
softmax = _core.kernels.softmax
log_sum_exp = _core.kernels.log_sum_exp

SUBNORMAL = 3e-45  # two units of the smallest float


def witness(x: Float32) -> np.ndarray:
    wide = x.astype(np.float64)
    exps = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def witness_log_sum(x: Float32) -> float:
    wide = x.astype(np.float64)
    return float(wide.max() + np.log(np.exp(wide - wide.max()).sum()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [0.1, 1.0, 20.0])
def test_matches_the_formula(size: int, spread: float) -> None:
    x = (np.random.default_rng(size).standard_normal((3, size)) * spread).astype(np.float32)
    # x - max is rounded: half a unit in the last place of the largest difference is a relative error of the result.
    tolerance = 1e-6 + 6e-8 * float(np.ptp(x))
    for offset in OFFSETS:
        out = softmax(poisoned(x, offset))
        np.testing.assert_allclose(out, witness(x), rtol=tolerance, atol=SUBNORMAL)
        np.testing.assert_allclose(out.sum(axis=-1, dtype=np.float64), 1.0, rtol=2e-6)
        log_sum = log_sum_exp(poisoned(x[0], offset))
        np.testing.assert_allclose(log_sum, witness_log_sum(x[0]), rtol=3e-7, atol=3e-7)


def test_exponential_over_its_whole_range() -> None:
    # Exactly representable steps, so that x - max is exact; e^0 stands for the maximum.
    x = -np.arange(0, 87.25, 2**-10, dtype=np.float32)
    pairs = np.stack([np.zeros_like(x), x], axis=1)
    np.testing.assert_allclose(softmax(pairs), witness(pairs), rtol=3e-7)


def test_small_exponentials_are_subnormal_then_zero() -> None:
    x = np.array([0, -90, -100, -103, -110, -1e4, -3e38, -np.inf], np.float32)
    out = softmax(x)
    np.testing.assert_allclose(out, witness(x), rtol=3e-7, atol=SUBNORMAL)
    assert (out[4:] == 0).all()
    assert (out[:3] > 0).all()


@pytest.mark.parametrize("value", [0.0, -3e38, 3e38, 88.8, -104.0])
def test_equal_values_share_alike(value: float) -> None:
    for size in SIZES:
        out = softmax(np.full(size, value, np.float32))
        np.testing.assert_allclose(out, np.full(size, 1 / size), rtol=2e-7)


def test_masked_scores_get_nothing() -> None:
    for size in SIZES[1:]:
        x = np.full(size, -np.inf, np.float32)
        x[size // 2] = -5
        out = softmax(x)
        assert out[size // 2] == 1
        assert np.count_nonzero(out) == 1
        assert log_sum_exp(x) == -5


def test_large_values_do_not_overflow() -> None:
    x = np.array([1e30, 1e30, -1e30], np.float32)
    np.testing.assert_array_equal(softmax(x), np.array([0.5, 0.5, 0], np.float32))
    assert log_sum_exp(np.array([1e4, 1e4 - 1], np.float32)) == pytest.approx(1e4 + np.log1p(np.exp(-1.0)))


def test_nan_is_not_hidden() -> None:
    for position in (0, 15, 16, 32):
        x = np.zeros(33, np.float32)
        x[position] = np.nan
        assert np.isnan(softmax(x)).all()
        assert np.isnan(log_sum_exp(x))


def test_a_vocabulary_of_logits() -> None:
    x = (np.random.default_rng(5).standard_normal(128_256) * 3).astype(np.float32)
    # 8016 additions in each lane: their roundings, at random, come to about sqrt(8016) units of 6e-8.
    np.testing.assert_allclose(log_sum_exp(x), witness_log_sum(x), rtol=0, atol=1e-5)
    np.testing.assert_allclose(softmax(x), witness(x), rtol=1e-5)


def test_rows_do_not_depend_on_each_other() -> None:
    x = np.random.default_rng(6).standard_normal((5, 33), np.float32)
    together = softmax(x)
    for row in range(len(x)):
        assert_same_bits(softmax(x[row]), together[row])


def test_targets_agree_to_the_last_bit() -> None:
    rng = np.random.default_rng(7)
    for size in SIZES:
        x = (rng.standard_normal((3, size)) * 30).astype(np.float32)
        assert_targets_agree(lambda x=x: softmax(x))
        assert_targets_agree(lambda x=x: np.array([log_sum_exp(row) for row in x], np.float32))


def test_refuses_what_it_cannot_take() -> None:
    with pytest.raises(TypeError, match=r"\[softmax\] x has dtype float32, got float16"):
        softmax(np.ones(3, np.float16))
    with pytest.raises(TypeError, match=r"\[log_sum_exp\] x has 1 dimensions, got 2"):
        log_sum_exp(np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="at least one element"):
        softmax(np.ones((2, 0), np.float32))
    with pytest.raises(ValueError, match="at least one element"):
        log_sum_exp(np.ones(0, np.float32))
    with pytest.raises(ValueError, match="C-contiguous"):
        softmax(np.ones(8, np.float32)[::2])
