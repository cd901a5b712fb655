# SPDX-License-Identifier: Apache-2.0
"""RMSNorm against its formula in float64."""

import numpy as np
import pytest
from float_cases import OFFSETS, SIZES, Float32, assert_same_bits, assert_targets_agree, poisoned

from ternaryforge import _core

pytestmark = pytest.mark.usefixtures("target")
rms_norm = _core.kernels.rms_norm
layer_norm = _core.kernels.layer_norm


def witness(x: Float32, weight: Float32, epsilon: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + epsilon) * weight.astype(np.float64)


@pytest.mark.parametrize("size", SIZES)
def test_matches_the_formula(size: int) -> None:
    rng = np.random.default_rng(size)
    x = rng.standard_normal((5, size), np.float32)
    weight = rng.standard_normal(size, np.float32)
    for offset in OFFSETS:
        out = rms_norm(poisoned(x, offset), poisoned(weight, offset), 1e-5)
        np.testing.assert_allclose(out, witness(x, weight, 1e-5), rtol=2e-6)


@pytest.mark.parametrize("magnitude", [1e-18, 1e-3, 1e15])
def test_small_and_large_values(magnitude: float) -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((2, 100)) * magnitude).astype(np.float32)
    weight = np.ones(100, np.float32)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-6), witness(x, weight, 1e-6), rtol=2e-6)


def test_zeros_stay_zeros() -> None:
    assert not rms_norm(np.zeros((2, 33), np.float32), np.ones(33, np.float32), 1e-5).any()


def test_a_long_row_keeps_its_precision() -> None:
    x = np.random.default_rng(2).standard_normal((1, 100_003), np.float32) + np.float32(3)
    weight = np.ones(x.shape[1], np.float32)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5), witness(x, weight, 1e-5), rtol=2e-6)


def test_rows_do_not_depend_on_each_other() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((7, 100), np.float32)
    weight = rng.standard_normal(100, np.float32)
    together = rms_norm(x, weight, 1e-5)
    for row in range(len(x)):
        assert_same_bits(rms_norm(x[row], weight, 1e-5), together[row])


def test_targets_agree_to_the_last_bit() -> None:
    rng = np.random.default_rng(4)
    for size in SIZES:
        x = rng.standard_normal((3, size), np.float32)
        weight = rng.standard_normal(size, np.float32)
        assert_targets_agree(lambda x=x, weight=weight: rms_norm(x, weight, 1e-5))


def test_refuses_what_it_cannot_take() -> None:
    x = np.ones((2, 8), np.float32)
    weight = np.ones(8, np.float32)
    with pytest.raises(TypeError, match=r"\[rms_norm\] x has dtype float32, got float64"):
        rms_norm(x.astype(np.float64), weight, 1e-5)
    with pytest.raises(TypeError, match=r"\[rms_norm\] weight has 1 dimensions, got 2"):
        rms_norm(x, x, 1e-5)
    with pytest.raises(TypeError):
        rms_norm(x.tolist(), weight, 1e-5)
    with pytest.raises(ValueError, match=r"last axis, 8, got 7"):
        rms_norm(x, weight[:7], 1e-5)
    with pytest.raises(ValueError, match="C-contiguous"):
        rms_norm(np.asfortranarray(x), weight, 1e-5)
    with pytest.raises(ValueError, match="at least one element"):
        rms_norm(x[:, :0].copy(), weight[:0], 1e-5)
    unaligned = np.zeros(33, np.uint8)[1:].view(np.float32)
    with pytest.raises(ValueError, match="aligned"):
        rms_norm(unaligned, weight, 1e-5)


def layer_norm_witness(x: Float32, weight: Float32, bias: Float32, epsilon: float) -> np.ndarray:
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    return centred / np.sqrt(wide.var(-1, keepdims=True) + epsilon) * weight + bias


@pytest.mark.parametrize("size", SIZES)
def test_layer_norm_matches_the_formula(size: int) -> None:
    rng = np.random.default_rng(size)
    x = rng.standard_normal((5, size), np.float32) + np.float32(20)  # a mean that must be taken away first
    weight, bias = rng.standard_normal((2, size), np.float32)
    for offset in OFFSETS:
        out = layer_norm(poisoned(x, offset), poisoned(weight, offset), poisoned(bias, offset), 1e-5)
        np.testing.assert_allclose(out, layer_norm_witness(x, weight, bias, 1e-5), rtol=2e-5, atol=2e-5)
        x = x - x.mean(-1, keepdims=True)
        out = layer_norm(x, weight, bias, 1e-5)
        np.testing.assert_allclose(out, layer_norm_witness(x, weight, bias, 1e-5), rtol=3e-6, atol=3e-6)


def test_layer_norm_of_a_constant_row_is_the_bias() -> None:
    bias = np.arange(33, dtype=np.float32)
    out = layer_norm(np.full((2, 33), 7, np.float32), np.ones(33, np.float32), bias, 1e-5)
    np.testing.assert_array_equal(out, [bias, bias])


def test_layer_norm_on_targets_agrees_to_the_last_bit() -> None:
    rng = np.random.default_rng(4)
    for size in SIZES:
        x = rng.standard_normal((3, size), np.float32)
        weight, bias = rng.standard_normal((2, size), np.float32)
        assert_targets_agree(lambda x=x, weight=weight, bias=bias: layer_norm(x, weight, bias, 1e-5))


def test_layer_norm_refuses_other_lengths() -> None:
    x, weight = np.ones((2, 8), np.float32), np.ones(8, np.float32)
    with pytest.raises(ValueError, match=r"\[layer_norm\] weight and bias have .* 8, got 8 and 7"):
        layer_norm(x, weight, weight[:7], 1e-5)
    with pytest.raises(TypeError, match=r"\[layer_norm\] bias has dtype float32, got int32"):
        layer_norm(x, weight, weight.astype(np.int32), 1e-5)
