# SPDX-License-Identifier: Apache-2.0
"""The packed modes of .1bit files: the C++ codec against NumPy written from the page."""

import numpy as np
import pytest
from numpy.typing import NDArray

from ternaryforge import _core

SHAPES = [(1, 1), (2, 3), (3, 4), (5, 8), (7, 13), (16, 64)]


def reference(trits: NDArray[np.int8], codes: dict[int, int], per_byte: int) -> NDArray[np.uint8]:
    rows, cols = trits.shape
    padded = np.zeros((rows, -(-cols // per_byte) * per_byte), np.uint8)
    padded[:, :cols] = np.vectorize(codes.get)(trits)
    shifts = np.arange(per_byte, dtype=np.uint8) * (8 // per_byte)
    return (padded.reshape(rows, -1, per_byte) << shifts).sum(axis=2).astype(np.uint8).reshape(-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_ternary(shape: tuple[int, int]) -> None:
    trits = np.random.default_rng(1).integers(-1, 2, shape, np.int8)
    packed = _core.formats.pack(trits, "onebit")
    np.testing.assert_array_equal(packed, reference(trits, {0: 0, 1: 1, -1: 3}, 4))
    np.testing.assert_array_equal(_core.formats.unpack(packed, "onebit", *shape), trits)


@pytest.mark.parametrize("shape", SHAPES)
def test_binary(shape: tuple[int, int]) -> None:
    signs = np.random.default_rng(2).integers(0, 2, shape, np.int8) * 2 - 1
    packed = _core.formats.pack(signs.astype(np.int8), "onebit_binary")
    np.testing.assert_array_equal(packed, reference(signs, {-1: 0, 1: 1}, 8))
    np.testing.assert_array_equal(_core.formats.unpack(packed, "onebit_binary", *shape), signs)


def test_the_seed_s_codes() -> None:
    trits = np.array([[0, 1, -1, 1]], np.int8)
    assert _core.formats.pack(trits, "onebit").tolist() == [0b01_11_01_00]
    signs = np.array([[1, -1, -1, -1, -1, -1, -1, 1]], np.int8)
    assert _core.formats.pack(signs, "onebit_binary").tolist() == [0b1000_0001]


def test_what_has_no_code() -> None:
    with pytest.raises(ValueError, match=r"\[onebit\] a weight is -1, 0 or 1, got 2 at row 0, column 1"):
        _core.formats.pack(np.array([[0, 2]], np.int8), "onebit")
    with pytest.raises(ValueError, match=r"\[onebit_binary\] a weight is -1 or 1, got 0 at row 1, column 0"):
        _core.formats.pack(np.array([[1], [0]], np.int8), "onebit_binary")


def test_damage() -> None:
    with pytest.raises(_core.FormatError, match=r"the code at row 0, column 1 is 2: the data is damaged"):
        _core.formats.unpack(np.array([0b1000], np.uint8), "onebit", 1, 3)
    with pytest.raises(_core.FormatError, match="behind the last column"):
        _core.formats.unpack(np.array([0b0100_0000], np.uint8), "onebit", 1, 3)
    with pytest.raises(_core.FormatError, match="behind the last column"):
        _core.formats.unpack(np.array([0b1000_0000], np.uint8), "onebit_binary", 1, 7)
