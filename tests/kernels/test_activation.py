# SPDX-License-Identifier: Apache-2.0
"""Gated activations against their formulas in float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from float_cases import OFFSETS, SIZES, Float32, assert_same_bits, assert_targets_agree, poisoned

from ternaryforge import _core

pytestmark = pytest.mark.usefixtures("target")
silu_multiply = _core.kernels.silu_multiply
relu_squared_multiply = _core.kernels.relu_squared_multiply
gelu_multiply = _core.kernels.gelu_multiply
relu_multiply = _core.kernels.relu_multiply
gelu_erf_multiply = _core.kernels.gelu_erf_multiply

Kernel = Callable[[Float32, Float32], Float32]


def silu_witness(gate: Float32, up: Float32) -> np.ndarray:
    wide = gate.astype(np.float64)
    return wide * np.exp(-np.logaddexp(0, -wide)) * up  # another form than the kernel's


def relu_squared_witness(gate: Float32, up: Float32) -> np.ndarray:
    return np.where(gate > 0, gate.astype(np.float64) ** 2, 0.0) * up


def gelu_witness(gate: Float32, up: Float32) -> np.ndarray:
    """The form of Hendrycks and Gimpel (2016) with tanh."""
    wide = gate.astype(np.float64)
    return 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))) * up


def gelu_erf_witness(gate: Float32, up: Float32) -> np.ndarray:
    wide = gate.astype(np.float64)
    return 0.5 * wide * np.vectorize(math.erfc)(-wide / np.sqrt(2)) * up


KERNELS = pytest.mark.parametrize(
    "kernel",
    [silu_multiply, relu_multiply, relu_squared_multiply, gelu_multiply, gelu_erf_multiply],
    ids=["silu", "relu", "relu_squared", "gelu", "gelu_erf"],
)


@pytest.mark.parametrize("size", SIZES)
def test_match_the_formulas(size: int) -> None:
    rng = np.random.default_rng(size)
    gate = (rng.standard_normal((2, size)) * 4).astype(np.float32)
    up = rng.standard_normal((2, size), np.float32)
    for offset in OFFSETS:
        out = silu_multiply(poisoned(gate, offset), poisoned(up, offset))
        np.testing.assert_allclose(out, silu_witness(gate, up), rtol=6e-7)
        out = relu_squared_multiply(poisoned(gate, offset), poisoned(up, offset))
        np.testing.assert_allclose(out, relu_squared_witness(gate, up), rtol=3e-7)
        out = gelu_multiply(poisoned(gate, offset), poisoned(up, offset))
        np.testing.assert_allclose(out, gelu_witness(gate, up), rtol=1e-6, atol=1e-6)
        out = gelu_erf_multiply(poisoned(gate, offset), poisoned(up, offset))
        np.testing.assert_allclose(out, gelu_erf_witness(gate, up), rtol=1e-6, atol=1e-6)
        out = relu_multiply(poisoned(gate, offset), poisoned(up, offset))
        np.testing.assert_array_equal(out, np.maximum(gate, 0) * up)


def test_exact_gelu_everywhere() -> None:
    gate = np.linspace(-15, 15, 200_001).astype(np.float32)
    ones = np.ones_like(gate)
    expected = gelu_erf_witness(gate, ones)
    out = gelu_erf_multiply(gate, ones)
    assert (np.abs(out - expected) <= 4e-7 * np.abs(gate)).all()
    tail = gate < -1
    np.testing.assert_allclose(out[tail & (gate > -12)], expected[tail & (gate > -12)], rtol=2e-5)
    extreme = np.array([-3e38, -1e4, -0.0, 0.0, 1e-30, 1e4, 3e38], np.float32)
    out = gelu_erf_multiply(extreme, np.ones_like(extreme))
    np.testing.assert_allclose(out, [0, 0, 0, 0, 5e-31, 1e4, 3e38], rtol=1e-7)


def test_silu_of_extreme_gates() -> None:
    gate = np.array([-3e38, -1e4, -104, -89, -88, -87, -1e-30, 0, 1e-30, 87, 89, 1e4, 3e38], np.float32)
    out = silu_multiply(gate, np.ones_like(gate))
    assert np.isfinite(out).all()
    # Below -88.7 the divisor is infinite: what is lost is 88.8 * exp(-88.8) at most.
    np.testing.assert_allclose(out, silu_witness(gate, np.ones_like(gate)), rtol=1e-6, atol=2.4e-37)


def test_gelu_of_extreme_gates() -> None:
    gate = np.array([-3e38, -1e4, -20, -9, -5, -1, -1e-30, 0, 1e-30, 1, 5, 9, 1e4, 3e38], np.float32)
    out = gelu_multiply(gate, np.ones_like(gate))
    assert np.isfinite(out).all()
    with np.errstate(over="ignore"):
        expected = gelu_witness(gate, np.ones_like(gate))
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_relu_squared_of_extreme_gates() -> None:
    gate = np.array([-np.inf, -1e30, -0.0, 0.0, 1e-30, 1e18, np.inf], np.float32)
    out = relu_squared_multiply(gate, np.ones_like(gate))
    np.testing.assert_allclose(out, [0, 0, 0, 0, 0, 1e36, np.inf], rtol=2e-7)


@KERNELS
def test_nan_is_not_hidden(kernel: Kernel) -> None:
    ones = np.ones(33, np.float32)
    for position in (0, 15, 16, 32):
        bad = ones.copy()
        bad[position] = np.nan
        np.testing.assert_array_equal(np.isnan(kernel(bad, ones)), np.isnan(bad))
        np.testing.assert_array_equal(np.isnan(kernel(ones, bad)), np.isnan(bad))


@KERNELS
def test_elements_do_not_depend_on_their_place(kernel: Kernel) -> None:
    rng = np.random.default_rng(1)
    gate, up = rng.standard_normal((2, 100), np.float32)
    whole = kernel(gate, up)
    for begin, end in ((0, 1), (1, 18), (3, 100), (99, 100)):
        assert_same_bits(kernel(gate[begin:end], up[begin:end]), whole[begin:end])


@KERNELS
def test_targets_agree_to_the_last_bit(kernel: Kernel) -> None:
    rng = np.random.default_rng(2)
    for size in SIZES:
        gate = (rng.standard_normal(size) * 10).astype(np.float32)
        up = rng.standard_normal(size, np.float32)
        assert_targets_agree(lambda gate=gate, up=up: kernel(gate, up))


@KERNELS
def test_refuse_what_they_cannot_take(kernel: Kernel) -> None:
    ones = np.ones((2, 4), np.float32)
    with pytest.raises(ValueError, match="one shape"):
        kernel(ones, np.ones((2, 5), np.float32))
    with pytest.raises(ValueError, match="one shape"):
        kernel(ones, np.ones(8, np.float32))
    with pytest.raises(TypeError, match="up has dtype float32, got int8"):
        kernel(ones, ones.astype(np.int8))
