# SPDX-License-Identifier: Apache-2.0
"""Products with two tied planes on every target against NumPy written from the arithmetic contract."""

import numpy as np
import pytest

from ternaryforge import _core

SHAPES = [(4, 1), (4, 7), (16, 8), (20, 17), (12, 64), (36, 100), (64, 257), (132, 1000)]
TOKENS = [1, 2, 3, 4, 5, 8, 9, 13, 17, 25, 130]
MAX_CODES = {"int8": 127, "int16": 32639}
KINDS = [("tensor", 64), ("row", 64), ("group", 64), ("group", 128)]


def made_levels(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-4, 5, (rows, cols)).astype(np.int8)


def packed(
    levels: np.ndarray, kind: str = "tensor", group_size: int = 64
) -> tuple[_core.formats.PackedTensor, np.ndarray]:
    """In the layout of files, and the weights as float64."""
    rows, cols = levels.shape
    shape = {"tensor": (1, 1), "row": (rows, 1), "group": (rows, -(-cols // group_size))}[kind]
    scales = np.random.default_rng(3).uniform(0.2, 2.0, shape).astype(np.float32)
    tensor = _core.formats.PackedTensor(
        "two_plane", rows, cols, _core.formats.pack(levels, "two_plane"), scale_kind=kind,  # type: ignore[arg-type]
        group_size=group_size if kind == "group" else 0, scales=scales.reshape(-1),
    )  # fmt: skip
    wide = np.repeat(scales, group_size, axis=1)[:, :cols] if kind == "group" else scales
    return tensor, levels * wide.astype(np.float64)


def quantized(x: np.ndarray, activations: str) -> tuple[np.ndarray, np.ndarray]:
    """s = limit * (1 / max(max |x|, 1e-5)) in float32, round half to even."""
    limit = np.float32(MAX_CODES[activations])
    scale = limit * (np.float32(1) / np.maximum(np.abs(x).max(axis=1), np.float32(1e-5)))
    return np.clip(np.rint(x * scale[:, None]), -limit, limit).astype(np.int16), scale


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_integer_sums_are_exact(target: str, rows: int, cols: int) -> None:
    levels = made_levels(rows, cols)
    tensor, _ = packed(levels)
    random = np.random.default_rng(1).integers(-128, 128, (3, cols))
    for codes in (random, np.full((1, cols), 127), np.full((1, cols), -128)):
        expected = codes.astype(np.int64) @ levels.T.astype(np.int64)
        np.testing.assert_array_equal(_core.kernels.ternary_dot(codes.astype(np.int8), tensor), expected)


@pytest.mark.parametrize("level", [4, -4])
@pytest.mark.parametrize("code", [127, -128])
@pytest.mark.parametrize("cols", [256, 6912, 28672])
def test_long_rows_of_extremes_do_not_saturate(target: str, cols: int, code: int, level: int) -> None:
    tensor, _ = packed(np.full((4, cols), level, np.int8))
    sums = _core.kernels.ternary_dot(np.full((1, cols), code, np.int8), tensor)
    np.testing.assert_array_equal(sums, np.full((1, 4), cols * code * level))
    many = np.full((9, cols), np.float32(np.sign(code)))
    expected = many.astype(np.float64) @ np.full((cols, 4), level * float(tensor.effective_scales[0]))
    np.testing.assert_allclose(_core.kernels.linear(many, tensor, activations="int8"), expected, rtol=1e-6)


@pytest.mark.parametrize(("kind", "group_size"), KINDS)
@pytest.mark.parametrize("activations", MAX_CODES)
def test_integer_linear_is_the_contract(target: str, activations: str, kind: str, group_size: int) -> None:
    rows, cols = 36, 1 + 11 * group_size // 2
    tensor, weights = packed(made_levels(rows, cols), kind, group_size)
    x = np.random.default_rng(2).normal(size=(max(TOKENS), cols)).astype(np.float32)
    codes, act_scale = quantized(x, activations)
    expected = codes.astype(np.float64) @ weights.T / act_scale[:, None]
    for tokens in TOKENS:
        actual = _core.kernels.linear(x[:tokens], tensor, activations=activations)  # type: ignore[arg-type]
        np.testing.assert_allclose(actual, expected[:tokens], rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
@pytest.mark.parametrize(("kind", "group_size"), KINDS)
def test_float_linear_is_the_product(target: str, kind: str, group_size: int, tokens: int) -> None:
    tensor, weights = packed(made_levels(20, 333), kind, group_size)
    x = np.random.default_rng(2).normal(size=(tokens, 333)).astype(np.float32)
    expected = x.astype(np.float64) @ weights.T
    actual = _core.kernels.linear(x, tensor, activations="float")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("activations", ["int8", "int16", "float"])
@pytest.mark.parametrize(("kind", "group_size"), KINDS[:3])
def test_every_target_team_and_batch_gives_the_same_bits(kind: str, group_size: int, activations: str) -> None:
    tensor, _ = packed(made_levels(36, 700), kind, group_size)
    x = np.random.default_rng(4).normal(size=(14, 700)).astype(np.float32)
    previous = _core.simd.active_target()
    results = []
    try:
        for name in _core.simd.supported_targets():
            _core.simd.use_target(name)
            for threads in (1, 3):
                parts = [
                    _core.kernels.linear(part, tensor, activations=activations, threads=threads)  # type: ignore[arg-type]
                    for part in (x, x[:1], x[1:4])
                ]
                results.append(np.concatenate(parts))
    finally:
        _core.simd.use_target(previous)
    assert all(np.array_equal(result, results[0]) for result in results)
    np.testing.assert_array_equal(results[0][:14], np.concatenate([results[0][14:], results[0][4:14]]))


def test_tiles_and_files_multiply_alike() -> None:
    tensor, _ = packed(made_levels(36, 300), "group", 64)
    x = np.random.default_rng(5).normal(size=(3, 300)).astype(np.float32)
    tiles = _core.kernels.repack(tensor, "t8")
    expected = _core.kernels.linear(x, tensor, activations="int8")
    np.testing.assert_array_equal(_core.kernels.linear(x, tiles, activations="int8"), expected)


def test_sums_that_could_leave_32_bits_are_refused() -> None:
    x = np.zeros((1, 16448), np.float32)
    tensor, _ = packed(np.zeros((4, 16448), np.int8), "row")
    with pytest.raises(ValueError, match="two planes are exact up to 16384 columns that share a scale, got 16448"):
        _core.kernels.linear(x, tensor, activations="int16")
    grouped, _ = packed(np.full((4, 16448), 4, np.int8), "group", 64)
    ones = np.ones_like(x)
    expected = grouped.effective_scales.astype(np.float64).sum(1) * 4 * 64
    found = _core.kernels.linear(ones, grouped, activations="int16")[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
