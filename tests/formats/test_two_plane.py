# SPDX-License-Identifier: Apache-2.0
"""Two tied trit planes in files and in tiles against NumPy written from the description of both."""

from typing import Literal

import numpy as np
import pytest

from ternaryforge import _core
from ternaryforge._core import FormatError

LAYOUTS: tuple[Literal["two_plane", "t8"], ...] = ("two_plane", "t8")


def make_levels(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(rows + cols).integers(-4, 5, (rows, cols)).astype(np.int8)


def two_plane(levels: np.ndarray) -> np.ndarray:
    """uint8 [2, rows / 4, cols]: 3 * first + second, each plane in four row blocks of two bits."""
    first = np.rint(levels / 3).astype(np.int8)
    planes = []
    for trits in (first, levels - 3 * first):
        blocks = (trits + 1).astype(np.uint8).reshape(4, -1, levels.shape[1])
        planes.append(blocks[0] | blocks[1] << 2 | blocks[2] << 4 | blocks[3] << 6)
    return np.stack(planes)


def t8(levels: np.ndarray) -> np.ndarray:
    """Tiles of 16 rows x 8 columns: four columns in the low halves of four bytes, four in the high."""
    rows, cols = levels.shape
    codes = np.full((-(-rows // 16) * 16, -(-cols // 8) * 8), 4, np.uint8)
    codes[:rows, :cols] = levels + 4
    halves = codes.reshape(len(codes) // 16, 16, -1, 2, 4).transpose(3, 0, 2, 1, 4)  # half, panel, tile, row, column
    return (halves[0] | halves[1] << 4).reshape(-1)


@pytest.mark.parametrize(("rows", "cols"), [(4, 1), (4, 8), (16, 7), (20, 9), (36, 100), (64, 257)])
def test_bytes_are_those_of_the_description(rows: int, cols: int) -> None:
    levels = make_levels(rows, cols)
    stored, tiles = two_plane(levels).reshape(-1), t8(levels)
    for layout, expected in zip(LAYOUTS, (stored, tiles), strict=True):
        found = _core.formats.pack(levels, layout)
        np.testing.assert_array_equal(found, expected)
        assert len(found) == _core.formats.layout_bytes(layout, rows, cols)
        np.testing.assert_array_equal(_core.formats.unpack(found, layout, rows, cols), levels)
    scales = np.linspace(0.5, 2, rows).astype(np.float32)
    tensor = _core.formats.PackedTensor("two_plane", rows, cols, stored, scale_kind="row", scales=scales)
    for threads in (1, 3):
        repacked = _core.kernels.repack(tensor, "t8", threads=threads)
        assert repacked.layout == "t8"
        np.testing.assert_array_equal(repacked.data, tiles)
        np.testing.assert_array_equal(repacked.effective_scales, scales)


def test_four_bits_a_weight() -> None:
    for layout in LAYOUTS:
        assert 8 * _core.formats.layout_bytes(layout, 64, 256) == 4 * 64 * 256


def test_each_plane_is_one_of_trits() -> None:
    levels = make_levels(8, 33)
    first, second = (
        _core.formats.unpack(plane, "hf_packed", 8, 33)
        for plane in _core.formats.pack(levels, "two_plane").reshape(2, -1)
    )
    np.testing.assert_array_equal(3 * first + second, levels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", [-5, 5, 127, -128])
def test_other_levels_are_refused(layout: str, level: int) -> None:
    levels = np.zeros((4, 9), np.int8)
    levels[2, 3] = level
    with pytest.raises(ValueError, match=rf"lies in -4 .. 4, got {level} at row 2, column 3"):
        _core.formats.pack(levels, layout)


def test_bytes_that_hold_no_levels_are_refused() -> None:
    stored = _core.formats.pack(make_levels(8, 5), "two_plane")
    for plane in (0, 1):
        damaged = stored.copy()
        damaged[plane * 10 + 7] |= 3 << 2
        with pytest.raises(FormatError, match="row 3, column 2 is 3"):
            _core.formats.unpack(damaged, "two_plane", 8, 5)
        tensor = _core.formats.PackedTensor("two_plane", 8, 5, damaged, scale_kind="row", scales=np.ones(8, np.float32))
        with pytest.raises(FormatError, match="stands for no trit"):
            _core.kernels.repack(tensor, "t8")
    tiles = _core.formats.pack(make_levels(8, 5), "t8")
    tiles[4 * 3 + 2] = 9
    with pytest.raises(FormatError, match="row 3, column 2 is 9, above 8"):
        _core.formats.unpack(tiles, "t8", 8, 5)


def test_what_does_not_fit_is_refused() -> None:
    ones = np.ones(8, np.float32)
    with pytest.raises(ValueError, match="multiple of 4, got 6 x 5"):
        _core.formats.pack(make_levels(6, 5), "two_plane")
    with pytest.raises(ValueError, match="codes need one, layout t8"):
        _core.formats.PackedTensor("t8", 8, 5, _core.formats.pack(make_levels(8, 5), "t8"))
    trits = _core.formats.PackedTensor("hf_packed", 8, 5, np.zeros(10, np.uint8), scale_kind="row", scales=ones)
    with pytest.raises(ValueError, match="only two_plane can become t8, got hf_packed"):
        _core.kernels.repack(trits, "t8")
    planes = _core.formats.PackedTensor("two_plane", 8, 5, np.full(20, 0x55, np.uint8), scale_kind="row", scales=ones)
    with pytest.raises(ValueError, match="hf_packed and file layouts become t16, got two_plane"):
        _core.kernels.repack(planes, "t16")
    with pytest.raises(ValueError, match="only t16 can become t20, got t8"):
        _core.kernels.repack(planes, "t20")
