# SPDX-License-Identifier: Apache-2.0
"""Rounding schemes against their formulas in float64, written apart from the core."""

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ternaryforge import _core

SCHEMES = ("ls", "absmean", "absmax", "twn")
Float32 = NDArray[np.float32]
Trits = NDArray[np.int8]

POSITIVE_FP16 = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
ONE = np.float32(1)
SURVIVES = POSITIVE_FP16[ONE / (ONE / POSITIVE_FP16) == POSITIVE_FP16]


def quantize(weights: Float32, **options: Any) -> tuple[Trits, Float32]:
    return _core.quant.quantize_weights(weights, **options)


def stored(scale: float, kind: str) -> np.float32:
    """Nearest value that binary16 holds; per tensor, that two reciprocals in float32 keep."""
    if kind != "tensor":
        return max(np.float32(np.float16(np.float64(scale))), POSITIVE_FP16[0])
    return SURVIVES[np.argmin(np.abs(SURVIVES.astype(np.float64) - scale))]


def witness_run(run: Float32, scheme: str, kind: str) -> tuple[np.float32, Trits]:
    """Scale and trits of the weights that share one scale."""
    size = np.abs(run.astype(np.float64))
    if not size.any():
        return np.float32(kind == "tensor"), np.zeros(run.shape, np.int8)
    if scheme == "ls":
        falling = np.sort(size, axis=None)[::-1]
        sums, counts = np.cumsum(falling), np.arange(1, size.size + 1)
        best = int(np.argmax(sums**2 / counts))
        scale = stored(sums[best] / counts[best], kind)
        support = size > scale / 2
    elif scheme == "twn":
        support = size > 0.7 * size.mean()
        scale = stored(size[support].mean(), kind)
    else:
        exact = size.mean() if scheme == "absmean" else size.max()
        support = np.clip(np.rint(size / exact), 0, 1) == 1
        scale = stored(exact, kind)
    return scale, np.where(support, np.sign(run), 0).astype(np.int8)


def witness(weights: Float32, scheme: str, kind: str, group: int) -> tuple[Trits, Float32]:
    rows, cols = weights.shape
    if kind == "tensor":
        scale, trits = witness_run(weights, scheme, kind)
        return trits, np.array([scale], np.float32)
    width = cols if kind == "row" else group
    trits = np.empty(weights.shape, np.int8)
    scales = np.empty((rows, -(-cols // width)), np.float32)
    for row, index in np.ndindex(scales.shape):
        part = np.s_[row, index * width : (index + 1) * width]
        scales[row, index], trits[part] = witness_run(weights[part], scheme, kind)
    return trits, scales[:, 0] if kind == "row" else scales


def draw(rng: np.random.Generator, shape: tuple[int, int], family: str) -> Float32:
    weights = {
        "normal": lambda: rng.standard_normal(shape) * 0.02,
        "heavy": lambda: np.clip(rng.standard_cauchy(shape), -6e4, 6e4),
        "sparse": lambda: rng.standard_normal(shape) * (rng.random(shape) < 0.05),
        "bfloat16": lambda: rng.standard_normal(shape),
        "levels": lambda: rng.integers(-3, 4, shape) * 0.25,
        "clusters": lambda: np.where(rng.random(shape) < 0.1, 7.0, 1.0) + rng.random(shape) * 0.1,
        "geometric": lambda: 0.8 ** rng.integers(0, 60, shape) * rng.choice([-1, 1], shape),
        "tiny": lambda: rng.standard_normal(shape) * 1e-7,
    }[family]()
    result = weights.astype(np.float32)
    if family == "bfloat16":  # many equal magnitudes
        result = (result.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return result


FAMILIES = ("normal", "heavy", "sparse", "bfloat16", "levels", "clusters", "geometric", "tiny")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_matches_its_formula(scheme: str, family: str) -> None:
    rng = np.random.default_rng(7)
    shapes = [(1, 1), (1, 7), (3, 64), (5, 65), (4, 127), (7, 191), (2, 300), (33, 513)]
    for shape in shapes:
        weights = draw(rng, shape, family)
        for kind, group in (("tensor", 64), ("row", 64), ("group", 64), ("group", 128), ("group", 256)):
            trits, scales = quantize(weights, scheme=scheme, scale=kind, group_size=group)
            expected_trits, expected_scales = witness(weights, scheme, kind, group)
            label = f"{shape} {kind} {group}"
            assert trits.dtype == np.int8, label
            assert scales.dtype == np.float32, label
            np.testing.assert_array_equal(scales, expected_scales, err_msg=label, strict=True)
            np.testing.assert_array_equal(trits, expected_trits, err_msg=label, strict=True)


def test_least_squares_is_the_best_of_all_supports() -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        size = int(rng.integers(1, 12))
        weights = draw(rng, (1, size), str(rng.choice(["normal", "heavy", "clusters"])))
        magnitudes = np.abs(weights[0].astype(np.float64))
        supports = np.array(list(itertools.product([0, 1], repeat=size)))[1:]
        scales = supports @ magnitudes / supports.sum(axis=1)
        errors = ((magnitudes - supports * scales[:, None]) ** 2).sum(axis=1)
        best = scales[np.argmin(errors)]
        trits, scale = quantize(weights, scheme="ls", scale="row")
        assert scale[0] == stored(best, "row")
        # The error is that of the exact optimum up to the rounding of the scale, 2^-11 relative.
        error = ((weights[0] - np.float64(scale[0]) * trits[0]) ** 2).sum()
        assert error <= errors.min() + size * (best * 2.0**-11) ** 2 * (1 + 1e-9)


def test_least_squares_in_exact_arithmetic_and_its_ties() -> None:
    """All multisets of small integers; among equal errors the larger scale wins."""
    for values in itertools.combinations_with_replacement(range(4), 5):
        if not any(values):
            continue
        falling = sorted(values, reverse=True)
        energies = [Fraction(sum(falling[:k]) ** 2, k) for k in range(1, 6)]
        k = energies.index(max(energies)) + 1
        _, scale = quantize(np.array([values], np.float32), scheme="ls", scale="row")
        assert scale[0] == stored(sum(falling[:k]) / k, "row"), values
    # 3^2 / 1 = (3 + 1 + 1 + 1)^2 / 4
    trits, scale = quantize(np.array([[1, -3, 1, 1]], np.float32), scheme="ls", scale="row")
    assert scale[0] == 3
    assert trits.tolist() == [[0, -1, 0, 0]]


def test_no_other_half_precision_scale_is_much_better() -> None:
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((1, 128)).astype(np.float32)
    trits, scale = quantize(weights, scheme="ls", scale="row")

    def error(s: np.float64) -> float:
        kept = np.where(np.abs(weights) > s / 2, np.sign(weights), 0)
        return float(((weights - s * kept) ** 2).sum())

    candidates = POSITIVE_FP16[(POSITIVE_FP16 > 0.3) & (POSITIVE_FP16 < 3)].astype(np.float64)
    best = min(error(s) for s in candidates)
    assert error(np.float64(scale[0])) <= best * (1 + 1e-6)
    assert trits.any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_results_do_not_depend_on_threads(scheme: str) -> None:
    weights = draw(np.random.default_rng(3), (301, 1027), "heavy")
    for kind in ("tensor", "row", "group"):
        one = quantize(weights, scheme=scheme, scale=kind, threads=1)
        for threads in (2, 3, 5):
            many = quantize(weights, scheme=scheme, scale=kind, threads=threads)
            assert one[0].tobytes() == many[0].tobytes()
            assert one[1].tobytes() == many[1].tobytes()


def test_large_tensor_matches_a_full_sort() -> None:
    for family in ("normal", "bfloat16", "heavy", "geometric"):
        weights = draw(np.random.default_rng(4), (512, 1000), family)
        trits, scales = quantize(weights, scheme="ls", scale="tensor", threads=2)
        expected_trits, expected_scales = witness(weights, "ls", "tensor", 64)
        assert scales == expected_scales
        np.testing.assert_array_equal(trits, expected_trits)


def test_every_scale_is_exact_in_half_precision() -> None:
    rng = np.random.default_rng(5)
    for exponent in range(-26, 15):
        weights = (rng.standard_normal((6, 200)) * 2.0**exponent).astype(np.float32)
        for kind in ("tensor", "row", "group"):
            _, scales = quantize(weights, scheme="ls", scale=kind, group_size=64)
            assert (scales > 0).all()
            np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))
            if kind == "tensor":
                np.testing.assert_array_equal(ONE / (ONE / scales), scales)


def test_tensor_scales_survive_the_reciprocal() -> None:
    """Each weight alone is its own least-squares scale: a sweep over all mantissas."""
    assert len(SURVIVES) < len(POSITIVE_FP16)  # the rule has something to do
    targets = np.arange(0x3C00, 0x4000, dtype=np.uint16).view(np.float16).astype(np.float32)
    for target in targets:
        _, scale = quantize(np.array([[target]]), scheme="absmax", scale="tensor")
        assert scale[0] == stored(float(target), "tensor")


def test_rounding_to_half_precision_happens_once() -> None:
    """1 + 2^-11 is a tie in binary16; a mean that is barely above it must round up."""
    weights = np.array([[1 + 2.0**-10, 1, 1 + 2.0**-10 + 2.0**-22, 1]], np.float32)
    barely = np.full((1, 2**15), 1 + 2.0**-11, np.float32)
    barely[0, 0] += np.float32(2.0**-22)
    for sample in (weights, barely):
        mean = sample.mean(dtype=np.float64)
        assert mean > 1 + 2.0**-11
        assert np.float32(mean) == np.float32(1 + 2.0**-11)  # rounding to float32 makes a tie
        _, scale = quantize(sample, scheme="absmean", scale="row")
        assert scale[0] == np.float32(1 + 2.0**-10)


def test_zeros() -> None:
    zeros = np.zeros((3, 130), np.float32)
    for scheme in SCHEMES:
        for kind, expected in (("tensor", [1.0]), ("row", [0.0] * 3), ("group", [[0.0] * 3] * 3)):
            trits, scales = quantize(zeros, scheme=scheme, scale=kind, group_size=64)
            assert not trits.any()
            assert scales.tolist() == expected
    one_row = zeros.copy()
    one_row[1, 5] = -2
    trits, scales = quantize(one_row, scheme="ls", scale="row")
    assert scales.tolist() == [0, 2, 0]
    assert trits.sum() == trits[1, 5] == -1


def test_underflow_keeps_the_smallest_scale() -> None:
    trits, scales = quantize(np.full((1, 4), 1e-9, np.float32), scheme="ls", scale="row")
    assert scales[0] == np.float32(2.0**-24)
    assert not trits.any()  # 1e-9 is nearer to 0 than to 2^-24
    trits, scales = quantize(np.full((1, 4), 4e-8, np.float32), scheme="ls", scale="row")
    assert scales[0] == np.float32(2.0**-24)
    assert trits.all()


def test_overflow_is_refused() -> None:
    weights = np.ones((4, 200), np.float32)
    weights[2, 70] = 65504
    _, scales = quantize(weights, scheme="absmax", scale="group", group_size=64)
    assert scales[2, 1] == 65504
    weights[2, 70] = 65520  # rounds to 65536
    with pytest.raises(ValueError, match=r"scale 65520 of row 2, group 1 is above 65504"):
        quantize(weights, scheme="absmax", scale="group", group_size=64)
    for kind in ("tensor", "row", "group"):
        with pytest.raises(ValueError, match="is above 65504"):
            quantize(np.full((2, 64), 3e38, np.float32), scheme="ls", scale=kind, group_size=64)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(bad: float) -> None:
    weights = np.ones((9, 70), np.float32)
    weights[4, 33] = bad
    weights[7, 1] = bad
    for kind in ("tensor", "row", "group"):
        with pytest.raises(ValueError, match=r"must be finite, got .* at row 4, column 33"):
            quantize(weights, scheme="ls", scale=kind, group_size=64, threads=2)


def test_arguments_are_checked() -> None:
    weights = np.ones((4, 64), np.float32)
    good: dict[str, Any] = {"scheme": "ls", "scale": "row"}
    for wrong in (weights.astype(np.float64), weights[0], weights[None], [[1.0]]):
        with pytest.raises(TypeError):
            quantize(wrong, **good)
    with pytest.raises(ValueError, match="C-contiguous"):
        quantize(weights.T, **good)
    for bad in (
        {"scheme": "best"},
        {"scale": "column"},
        {"scale": "none"},
        {"scale": "group", "group_size": 100},
        {"scale": "group", "group_size": 0},
        {"threads": 0},
    ):
        with pytest.raises(ValueError, match=r"^\["):
            quantize(weights, **{**good, **bad})
    for shape in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="rows and columns"):
            quantize(np.ones(shape, np.float32), **good)
