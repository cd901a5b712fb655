# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding against complex multiplication in float64."""

import numpy as np
import pytest
from float_cases import OFFSETS, SIZES, Float32, assert_same_bits, assert_targets_agree, poisoned

from ternaryforge import _core

pytestmark = pytest.mark.usefixtures("target")
rotate_halves = _core.kernels.rotate_halves


def witness(heads: Float32, cos: Float32, sin: Float32) -> np.ndarray:
    half = cos.size
    wide = heads.astype(np.float64)
    turned = (wide[..., :half] + 1j * wide[..., half:]) * (cos.astype(np.float64) + 1j * sin.astype(np.float64))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def angles(half: int, position: int) -> tuple[Float32, Float32]:
    phase = position * 10000.0 ** (-np.arange(half) / half)
    return np.cos(phase).astype(np.float32), np.sin(phase).astype(np.float32)


@pytest.mark.parametrize("half", SIZES)
def test_matches_complex_multiplication(half: int) -> None:
    heads = np.random.default_rng(half).standard_normal((4, 2 * half), np.float32)
    cos, sin = angles(half, 1234)
    for offset in OFFSETS:
        out = rotate_halves(poisoned(heads, offset), poisoned(cos, offset), poisoned(sin, offset))
        np.testing.assert_allclose(out, witness(heads, cos, sin), rtol=0, atol=1e-6)


def test_position_zero_changes_nothing() -> None:
    heads = np.random.default_rng(1).standard_normal((3, 128), np.float32)
    cos, sin = angles(64, 0)
    assert_same_bits(rotate_halves(heads, cos, sin), heads)


def test_a_quarter_turn_swaps_the_halves() -> None:
    heads = np.random.default_rng(2).standard_normal((3, 34), np.float32)
    out = rotate_halves(heads, np.zeros(17, np.float32), np.ones(17, np.float32))
    np.testing.assert_array_equal(out, np.concatenate([-heads[:, 17:], heads[:, :17]], axis=1))


def test_large_values() -> None:
    heads = np.full((1, 20), 1e37, np.float32)
    cos, sin = angles(10, 77)
    np.testing.assert_allclose(rotate_halves(heads, cos, sin), witness(heads, cos, sin), rtol=0, atol=2e30)


def test_heads_do_not_depend_on_each_other() -> None:
    heads = np.random.default_rng(3).standard_normal((2, 5, 80), np.float32)
    cos, sin = angles(40, 9)
    together = rotate_halves(heads, cos, sin)
    for index in np.ndindex(2, 5):
        assert_same_bits(rotate_halves(heads[index], cos, sin), together[index])


def test_targets_agree_to_the_last_bit() -> None:
    rng = np.random.default_rng(4)
    for half in SIZES:
        heads = rng.standard_normal((3, 2 * half), np.float32)
        cos, sin = angles(half, 321)
        assert_targets_agree(lambda heads=heads, cos=cos, sin=sin: rotate_halves(heads, cos, sin))


def test_refuses_what_it_cannot_take() -> None:
    heads = np.ones((2, 8), np.float32)
    four = np.ones(4, np.float32)
    with pytest.raises(ValueError, match="even, got 7"):
        rotate_halves(np.ones((2, 7), np.float32), four, four)
    with pytest.raises(ValueError, match=r"half the length of a head, 4, got 4 and 3"):
        rotate_halves(heads, four, four[:3])
    with pytest.raises(TypeError, match=r"\[rotate_halves\] cos has dtype float32, got float64"):
        rotate_halves(heads, four.astype(np.float64), four)
