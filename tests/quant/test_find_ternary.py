# SPDX-License-Identifier: Apache-2.0
"""Detection of weights that are ternary as they stand, and its traps."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ternaryforge import _core

Float32 = NDArray[np.float32]


def find(weights: Float32, **options: Any) -> tuple[str, NDArray[np.int8], Float32] | None:
    return _core.quant.find_ternary(weights, **options)


def kind_of(weights: Float32, group_size: int = 64) -> str | None:
    found = find(weights, group_size=group_size)
    return None if found is None else found[0]


def trits(rng: np.random.Generator, rows: int, cols: int) -> NDArray[np.int8]:
    return rng.integers(-1, 2, (rows, cols)).astype(np.int8)


@pytest.mark.parametrize("shape", [(4, 64), (8, 130), (3, 1000), (5, 63)])
def test_what_was_baked_comes_back(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    rows, cols = shape
    codes = trits(rng, rows, cols)
    codes[:, ::64] = 1  # no group is all zero
    groups = -(-cols // 64)
    # Odd scales, not exact in half precision: they are kept bit by bit.
    for kind, scales in (
        ("tensor", np.array([0.123456], np.float32)),
        ("row", rng.random(rows).astype(np.float32) + 0.1),
        ("group", rng.random((rows, groups)).astype(np.float32) + 0.1),
    ):
        if kind == "group" and groups == 1:
            continue
        per_weight = np.repeat(
            np.broadcast_to(scales if kind == "group" else scales[:, None], (rows, groups)), 64, axis=1
        )[:, :cols]
        weights = codes * per_weight
        for threads in (1, 3):
            found = find(weights, group_size=64, threads=threads)
            assert found is not None
            assert found[0] == kind
            np.testing.assert_array_equal(found[1], codes, strict=True)
            np.testing.assert_array_equal(found[2], scales, strict=True)


def test_dense_weights_are_not_ternary() -> None:
    rng = np.random.default_rng(1)
    for shape in ((1, 64), (8, 100), (64, 3)):
        assert kind_of(rng.standard_normal(shape).astype(np.float32)) is None


def test_one_weight_off_is_not_ternary() -> None:
    codes = trits(np.random.default_rng(2), 16, 200)
    weights = codes * np.float32(0.3)
    assert kind_of(weights) == "tensor"
    last = np.argwhere(codes[15] != 0)[-1][0]
    weights[15, last] = np.nextafter(weights[15, last], np.float32(1))
    assert kind_of(weights) is None


def test_uneven_levels_are_not_ternary() -> None:
    assert kind_of(np.tile(np.array([[-0.5, 0, 0.25]], np.float32), (4, 30))) is None
    assert kind_of(np.tile(np.array([[-1, 0, 1, 2]], np.float32), (4, 30))) is None


def test_ternary_per_group_only_for_groups_that_divide_the_real_ones() -> None:
    rng = np.random.default_rng(3)
    codes = trits(rng, 4, 512)
    codes[:, 0] = codes[:, -1] = 1
    per_group = np.repeat(rng.random((4, 4)).astype(np.float32) + 0.5, 128, axis=1)
    weights = codes * per_group
    assert kind_of(weights, 64) == "group"
    assert kind_of(weights, 128) == "group"
    assert kind_of(weights, 256) is None


def test_zero_rows_and_groups_fit_any_scale() -> None:
    codes = trits(np.random.default_rng(4), 6, 128)
    codes[:, 0] = 1
    codes[2] = 0
    codes[4, :64] = 0
    found = find(codes * np.float32(0.7), group_size=64)
    assert found is not None
    assert found[0] == "tensor"
    assert found[2] == np.float32(0.7)
    scales = np.linspace(0.1, 0.9, 6, dtype=np.float32)
    found = find(codes * scales[:, None], group_size=64)
    assert found is not None
    assert found[0] == "row"
    expected = scales.copy()
    expected[2] = 0
    np.testing.assert_array_equal(found[2], expected)


def test_zeros_have_a_scale_of_one() -> None:
    found = find(np.zeros((3, 70), np.float32))
    assert found is not None
    assert found[0] == "tensor"
    assert found[2].tolist() == [1.0]
    assert not found[1].any()


def test_one_sign_only_and_binary() -> None:
    rng = np.random.default_rng(5)
    for values in ([-0.25, 0.0], [-0.25], [-0.25, 0.25], [-0.0, 0.25, 0.0]):
        weights = rng.choice(np.array(values, np.float32), (8, 96))
        found = find(weights)
        assert found is not None
        assert found[0] == "tensor"
        np.testing.assert_array_equal(found[1] * found[2], weights)


def test_single_column_is_no_evidence() -> None:
    """Every matrix of one column has one magnitude per row."""
    column = np.random.default_rng(6).random((8, 1)).astype(np.float32)
    assert kind_of(column) is None
    assert kind_of(np.full((8, 1), 0.5, np.float32)) == "tensor"
    assert kind_of(np.diag(np.arange(1, 9)).astype(np.float32)) is None


def test_extreme_scales_are_kept() -> None:
    codes = trits(np.random.default_rng(7), 4, 64)
    codes[0, 0] = 1
    for scale in (1e-45, 1e-30, 3e38):
        found = find(codes * np.float32(scale))
        assert found is not None
        assert found[2] == np.float32(scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_ternary(bad: float) -> None:
    weights = trits(np.random.default_rng(8), 4, 64).astype(np.float32)
    weights[3, 63] = bad
    assert find(weights) is None
    assert find(np.full((4, 64), bad, np.float32)) is None


def test_detection_agrees_with_every_row_and_group_looked_at_alone() -> None:
    rng = np.random.default_rng(9)
    for _ in range(200):
        rows, cols = int(rng.integers(1, 6)), int(rng.integers(2, 200))
        weights = trits(rng, rows, cols) * rng.choice(np.array([1, 2], np.float32), (rows, 1))
        if rng.random() < 0.4:
            weights[int(rng.integers(rows)), int(rng.integers(cols))] = rng.choice([0.5, 1, 2, 3])
        size = np.abs(weights)

        def one_magnitude(part: Float32) -> bool:
            return len(set(part[part > 0].tolist())) <= 1

        starts = range(0, cols, 64)
        if one_magnitude(size):
            expected: str | None = "tensor"
        elif all(one_magnitude(row) for row in size):
            expected = "row"
        elif all(one_magnitude(row[start : start + 64]) for row in size for start in starts):
            expected = "group"
        else:
            expected = None
        if expected in ("row", "group") and cols < 16:
            continue  # the rule of shared scales may decide otherwise
        assert kind_of(weights.astype(np.float32)) == expected


def test_arguments_are_checked() -> None:
    weights = np.ones((4, 64), np.float32)
    for wrong in (weights.astype(np.float16), weights[0]):
        with pytest.raises(TypeError):
            find(wrong)
    with pytest.raises(ValueError, match="C-contiguous"):
        find(weights.T)
    for bad in ({"group_size": 100}, {"group_size": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match=r"^\["):
            find(weights, **bad)
