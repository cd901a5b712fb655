# SPDX-License-Identifier: Apache-2.0
"""MLX's affine groups as ternary weights, packed here from their document."""

import numpy as np
import pytest

from ternaryforge import _core
from ternaryforge._core import FormatError

decode = _core.formats.decode_mlx


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint32 words, the first column in the lowest bits."""
    per_word = 32 // bits
    words = codes.astype(np.uint32).reshape(len(codes), -1, per_word)
    shifts = (bits * np.arange(per_word)).astype(np.uint32)
    return np.ascontiguousarray((words << shifts).sum(axis=-1, dtype=np.uint32)).view(np.uint8).ravel()


@pytest.mark.parametrize(
    ("bits", "factor", "offset", "low"),
    [(2, 1.0, -1.0, 0), (2, -1.0, 1.0, 0), (2, 1.0, -2.0, 1), (1, 2.0, -1.0, 0)],
    ids=["scale", "mirrored", "upper codes", "binary"],
)
def test_trits_and_scales(bits: int, factor: float, offset: float, low: int) -> None:
    """weight = factor * d * code + offset * d."""
    rng = np.random.default_rng(0)
    d = np.float16(rng.uniform(0.01, 1, (6, 4))).astype(np.float32)
    codes = rng.integers(low, low + (2 if bits == 1 else 3), (6, 256))
    weights = np.repeat(d, 64, axis=1) * (factor * codes + offset)
    for threads in (1, 3):
        trits, scales = decode(
            packed(codes, bits),
            d * np.float32(factor),
            d * np.float32(offset),
            bits=bits,
            group_size=64,
            threads=threads,
        )
        assert trits.dtype == np.int8
        np.testing.assert_array_equal(scales, d)
        np.testing.assert_array_equal(trits * np.repeat(scales, 64, axis=1), weights)


def test_zero_groups() -> None:
    trits, scales = decode(
        np.zeros(16, np.uint8), np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32), bits=2, group_size=64
    )
    assert not trits.any()
    assert scales == [[0]]


@pytest.mark.parametrize(("scale", "bias"), [(1.0, -1.0), (0.5, -0.4), (np.nan, 0.0), (1.0, np.inf)])
def test_four_levels_and_damaged_scales_are_refused(scale: float, bias: float) -> None:
    codes = np.arange(128).reshape(1, 128) % 4
    codes[:, :64] = 1
    scales, biases = np.array([[1, scale]], np.float32), np.array([[-1, bias]], np.float32)
    with pytest.raises(FormatError, match=r"row 0, columns 64 to 127 are not -s, 0 and \+s"):
        decode(packed(codes, 2), scales, biases, bits=2, group_size=64)


def test_sizes_are_checked() -> None:
    one = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="1 or 2 bits, got 4"):
        decode(np.zeros(32, np.uint8), one, one, bits=4, group_size=64)
    with pytest.raises(ValueError, match="sizes do not match 1 x 64"):
        decode(np.zeros(15, np.uint8), one, one, bits=2, group_size=64)
    with pytest.raises(ValueError, match="no whole words"):
        decode(np.zeros(16, np.uint8), one, one, bits=2, group_size=24)
