# SPDX-License-Identifier: Apache-2.0
"""The calibrator against NumPy: moments, scales by exhaustive search, feedback by brute force and as GPTQ writes it."""

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ternaryforge import _core

Float32, Float64 = NDArray[np.float32], NDArray[np.float64]
Trits = NDArray[np.int8]
LARGEST = {1: 1, 2: 4}  # level, by planes


def make_moments(random: np.random.Generator, cols: int) -> Float64:
    """Correlated inputs, as activations are."""
    x = random.normal(size=(4 * cols, cols)) @ random.normal(size=(cols, cols)) / np.sqrt(cols)
    x += random.normal(size=(4 * cols, 1))
    return x.T @ x / len(x) + 0.01 * np.eye(cols)


def factor_of(moments: Float64) -> Float64:
    """R upper triangular with R R^T = moments."""
    return np.ascontiguousarray(np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1])


def dequantized(trits: Trits, scales: Float32, run: int) -> Float64:
    rows, cols = trits.shape
    return trits * np.repeat(scales.astype(np.float64).reshape(rows, -1), run, 1)[:, :cols]


def error_of(target: Float64, weights: Float64, moments: Float64) -> Float64:
    rest = target - weights
    return ((rest @ moments) * rest).sum(-1)


def stored(scale: float) -> float:
    return float(max(np.float16(scale), np.float16(2**-24))) if scale > 0 else 0.0


def best_scale(sizes: Float64, importance: Float64, planes: int) -> float:
    """Exhaustive: the weighted least-squares scale of every choice of levels, 2^n or 5^n of them."""
    every = np.array(list(itertools.product(range(LARGEST[planes] + 1), repeat=len(sizes))), np.float64)[1:]
    scales = every @ (importance * sizes) / (every**2 @ importance)
    errors = ((sizes - scales[:, None] * every) ** 2) @ importance
    return float(scales[errors.argmin()])


def nearest(weights: Float64, scale: Float64, planes: int) -> Trits:
    """Of two levels at the same distance the one nearer to 0."""
    levels = np.arange(-LARGEST[planes], LARGEST[planes] + 1)
    levels = levels[np.argsort(np.abs(levels), kind="stable")]
    return levels[np.abs(weights[..., None] - levels * np.asarray(scale)[..., None]).argmin(-1)].astype(np.int8)


def fitted_scale(sizes: Float64, importance: Float64, planes: int) -> float:
    """The exact optimum by trying the levels between every two scales at which a level changes."""
    steps = np.sort((sizes[:, None] / (np.arange(LARGEST[planes]) + 0.5)).reshape(-1))[::-1]
    best, least = 0.0, np.inf
    for scale in (steps + np.append(steps[1:], 0)) / 2:
        levels = np.minimum(np.ceil(sizes / max(scale, 1e-30) - 0.5), LARGEST[planes])
        found = (importance * sizes) @ levels / (importance @ levels**2)
        error = importance @ (sizes - found * levels) ** 2
        if error < least - 1e-12:
            best, least = found, error
    return float(best)


def gptq(target: Float64, moments: Float64, importance: Float64, group: int, planes: int) -> tuple[Trits, Float32]:
    """As the paper writes it: the upper Cholesky factor of the inverse, weights changed in place."""
    upper = np.linalg.cholesky(np.linalg.inv(moments)).T
    weights = target.copy()
    rows, cols = target.shape
    trits = np.zeros(target.shape, np.int8)
    scales = np.zeros((rows, -(-cols // group)), np.float32)
    for begin in range(0, cols, group):
        run = slice(begin, min(cols, begin + group))
        for row in range(rows):
            scales[row, begin // group] = stored(fitted_scale(np.abs(weights[row, run]), importance[run], planes))
        for k in range(run.start, run.stop):
            scale = scales[:, begin // group].astype(np.float64)
            trits[:, k] = nearest(weights[:, k], scale, planes)
            error = (weights[:, k] - scale * trits[:, k]) / upper[k, k]
            weights[:, k + 1 :] -= np.outer(error, upper[k, k + 1 :])
    return trits, scales


def on_every_target(run: Any) -> list[Any]:
    """What a function of a number of threads gives on every target."""
    found = []
    previous = _core.simd.active_target()
    try:
        for name, threads in itertools.product(_core.simd.supported_targets(), (1, 3)):
            _core.simd.use_target(name)
            assert _core.simd.active_target() == name
            found.append(run(threads))
    finally:
        _core.simd.use_target(previous)
    return found


@pytest.mark.parametrize(("tokens", "cols", "cols_b"), [(1, 1, 3), (5, 16, 17), (600, 37, 20), (257, 64, 130)])
def test_moments_equal_numpy_on_every_target(target: str, tokens: int, cols: int, cols_b: int) -> None:
    random = np.random.default_rng(tokens)
    a = random.normal(size=(tokens, cols)).astype(np.float32) * np.float32(30)
    b = random.normal(size=(tokens, cols_b)).astype(np.float32)
    wide, wide_b = a.astype(np.float64), b.astype(np.float64)
    start = random.normal(size=(cols, cols))
    start += start.T
    moments, cross = start.copy(), np.zeros((cols, cols_b))
    _core.quant.sum_moments(a, None, moments)
    _core.quant.sum_moments(a, b, cross)
    np.testing.assert_allclose(moments, start + wide.T @ wide, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(cross, wide.T @ wide_b, rtol=1e-12, atol=1e-9)
    assert np.array_equal(moments, moments.T)


def test_moments_are_the_same_bits_for_targets_and_threads() -> None:
    """Products of floats are exact in double, so that fused or not makes no difference."""
    x = np.random.default_rng(2).normal(size=(300, 70)).astype(np.float32)

    def run(threads: int) -> Float64:
        sums = np.zeros((70, 70))
        _core.quant.sum_moments(x, None, sums, threads=threads)
        return sums

    found = on_every_target(run)
    assert all(np.array_equal(sums, found[0]) for sums in found)


@pytest.mark.parametrize(("rows", "cols", "group"), [(35, 333, 64), (33, 150, 0), (5, 7, 64)])
def test_rounding_is_the_same_bits_for_targets_and_threads(rows: int, cols: int, group: int) -> None:
    """Odd sizes: tiles of rows, blocks of columns and the four of them in registers are all ragged."""
    random = np.random.default_rng(cols)
    target, moments = random.normal(size=(rows, cols)), make_moments(random, cols)
    factor, lacking = factor_of(moments), random.normal(size=(rows, cols))
    options: dict[str, Any] = {"scale": "group" if group else "row", "group_size": group or 64}

    def run(threads: int) -> tuple[Any, ...]:
        better = target.copy()
        _core.quant.add_correction(better, lacking, factor, threads=threads)
        trits, scales = _core.quant.round_with_feedback(
            better, factor, np.diag(moments).copy(), rule="fit", threads=threads, **options
        )
        first = trits.copy()
        _core.quant.descend(better, moments, trits, scales, rounds=3, threads=threads, **options)
        return better, first, trits, scales

    found = on_every_target(run)
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 20), (37, 300)])
def test_correction_is_the_solution(target: str, rows: int, cols: int) -> None:
    random = np.random.default_rng(rows)
    moments, weights, lacking = make_moments(random, cols), random.normal(size=(rows, cols)), np.ones((rows, cols))
    found = weights.copy()
    _core.quant.add_correction(found, lacking, factor_of(moments), threads=2)
    np.testing.assert_allclose(found, weights + np.linalg.solve(moments, lacking.T).T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_scale_equals_exhaustive_search(seed: int, planes: Any) -> None:
    random = np.random.default_rng(seed)
    cols = {1: 10, 2: 6}[planes]
    target = random.standard_t(3, size=(3, cols))
    importance = random.exponential(size=cols) + 0.01
    trits, scales = _core.quant.round_with_feedback(target, None, importance, rule="fit", scale="row", planes=planes)
    for row in range(3):
        exact = best_scale(np.abs(target[row]), importance, planes)
        # Levels 1 at a scale and 3 at a third of it are the same weights.
        same = [stored(exact * factor) for factor in (1, 1 / 2, 2, 1 / 3, 3, 1 / 4, 4)[: 1 if planes == 1 else None]]
        assert scales[row] in same
        errors = []
        for scale in (float(scales[row]), stored(exact), fitted_scale(np.abs(target[row]), importance, planes)):
            levels = nearest(target[row], np.float64(scale), planes)
            errors.append(importance @ (target[row] - scale * levels) ** 2)
        np.testing.assert_allclose(errors, errors[0], rtol=1e-4)
        assert np.array_equal(trits[row], nearest(target[row], scales[row].astype(np.float64), planes))


def test_grid_and_simple_rules() -> None:
    random = np.random.default_rng(1)
    target = random.normal(size=(4, 100))
    importance = random.exponential(size=100) + 0.01
    size = np.abs(target)
    mean = size.mean(-1)
    grid = mean[:, None] * np.arange(10, 61) / 20
    kept = size[:, None] > grid[..., None] / 2
    errors = (importance * (size[:, None] - kept * grid[..., None]) ** 2).sum(-1)
    expected = {
        "grid": grid[np.arange(4), errors.argmin(-1)],
        "absmean": mean,
        "twn": np.array([row[row > 0.7 * row.mean()].mean() for row in size]),
    }
    for rule, scales in expected.items():
        found = _core.quant.round_with_feedback(target, None, importance, rule=rule, scale="row")[1]  # type: ignore[arg-type]
        assert [float(scale) for scale in found] == [stored(scale) for scale in scales]


def test_grid_of_two_planes() -> None:
    """The first plane has 0.5 to 3.0 times the mean; trits alone have rules that two planes do not."""
    random = np.random.default_rng(1)
    target, importance = random.normal(size=(4, 100)), random.exponential(size=100) + 0.01
    size = np.abs(target)
    grid = size.mean(-1)[:, None] * np.arange(10, 61) / 60
    errors = (importance * (size[:, None] - grid[..., None] * nearest(size[:, None], grid[..., None], 2)) ** 2).sum(-1)
    expected = grid[np.arange(4), errors.argmin(-1)]
    found = _core.quant.round_with_feedback(target, None, importance, rule="grid", scale="row", planes=2)[1]
    assert [float(scale) for scale in found] == [stored(scale) for scale in expected]
    for rule in ("absmean", "twn"):
        with pytest.raises(ValueError, match="two planes take the rule fit or grid"):
            _core.quant.round_with_feedback(target, None, importance, rule=rule, scale="row", planes=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="planes is 1 or 2, got 3"):
        _core.quant.round_with_feedback(target, None, importance, rule="fit", scale="row", planes=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("rows", "cols", "group"), [(9, 64, 64), (4, 200, 64), (17, 300, 128), (3, 300, 256)])
def test_feedback_equals_gptq(rows: int, cols: int, group: int, planes: Any) -> None:
    random = np.random.default_rng(rows)
    target, moments = random.normal(size=(rows, cols)), make_moments(random, cols)
    importance = np.diag(moments).copy()
    expected = gptq(target, moments, importance, group, planes)
    for threads in (1, 3):
        trits, scales = _core.quant.round_with_feedback(
            target, factor_of(moments), importance, rule="fit", scale="group", group_size=group, planes=planes,
            threads=threads,
        )  # fmt: skip
        assert np.array_equal(trits, expected[0])
        assert np.array_equal(scales, expected[1])


@pytest.mark.parametrize("planes", [1, 2])
def test_the_last_columns_are_the_best_there_are(planes: Any) -> None:
    """Brute force: given the trits on the left, no choice for the last column has a smaller error."""
    random = np.random.default_rng(3)
    target, moments = random.normal(size=(20, 6)), make_moments(random, 6)
    scale, largest = 0.8125 / LARGEST[planes], LARGEST[planes]
    trits, _ = _core.quant.round_with_feedback(
        target, factor_of(moments), np.ones(6), rule="fit", scale="tensor", tensor_scale=scale, planes=planes
    )
    for row in range(20):
        for k in range(6):
            # The columns on the right may take any real value: what is left is the term of the factor.
            errors = []
            for trit in range(-largest, largest + 1):
                rest = target[row, : k + 1] - scale * np.append(trits[row, :k], trit)
                schur = moments[: k + 1, : k + 1]
                if k < 5:
                    side = moments[: k + 1, k + 1 :]
                    schur = schur - side @ np.linalg.inv(moments[k + 1 :, k + 1 :]) @ side.T
                errors.append(rest @ schur @ rest)
            assert errors[trits[row, k] + largest] <= min(errors) + 1e-9


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("kind", ["tensor", "row", "group"])
def test_descent_never_rises_and_ends_where_no_level_helps(kind: Any, planes: Any) -> None:
    random = np.random.default_rng(4)
    rows, cols, group = 19, 150, 64
    target, moments = random.normal(size=(rows, cols)), make_moments(random, cols)
    run = {"tensor": cols, "row": cols, "group": group}[kind]
    options = {"scale": kind, "group_size": group, "planes": planes}
    trits, scales = _core.quant.round_with_feedback(
        target, None, np.ones(cols), rule="fit", tensor_scale=1.25 / LARGEST[planes], **options
    )

    def error() -> Float64:
        shape = scales.repeat(rows) if kind == "tensor" else scales
        return error_of(target, dequantized(trits, shape, run), moments)

    before = error()
    for rounds in (1, 2, 30):
        _core.quant.descend(target, moments, trits, scales, rounds=rounds, sweeps=50, threads=rounds % 3 + 1, **options)
        assert (error() <= before * (1 + 1e-9)).all()
        before = error()
    assert before.sum() < 0.5 * error_of(target, np.zeros_like(target), moments).sum()
    if kind == "tensor":
        assert scales[0] == np.float32(1.25 / LARGEST[planes])
    assert np.array_equal(scales, scales.astype(np.float16).astype(np.float32))
    levels = range(-LARGEST[planes], LARGEST[planes] + 1)
    for row, k, level in itertools.product(range(rows), range(0, cols, 21), levels):
        kept = trits[row, k]
        trits[row, k] = level
        assert error()[row] >= before[row] * (1 - 1e-9)
        trits[row, k] = kept


def test_descent_solves_for_all_scales_at_once() -> None:
    """With no sweep the scales are those of the normal equations, but for rounding to 16 bits; a negative one turns."""
    random = np.random.default_rng(5)
    cols, group = 200, 64
    target, moments = random.normal(size=(8, cols)), make_moments(random, cols)
    trits = random.integers(-1, 2, (8, cols)).astype(np.int8)
    trits[:, :group] = -np.sign(target[:, :group])
    signs, scales = trits.copy(), np.ones((8, 4), np.float32)
    _core.quant.descend(target, moments, trits, scales, scale="group", group_size=group, rounds=1, sweeps=0)
    for row in range(8):
        basis = np.zeros((4, cols))
        for run in range(4):
            columns = slice(run * group, (run + 1) * group)
            basis[run, columns] = signs[row, columns]
        exact = np.linalg.solve(basis @ moments @ basis.T, basis @ moments @ target[row])
        signed = scales[row] * np.sign((basis @ trits[row]) + 1e-9)
        assert exact[0] < 0
        np.testing.assert_allclose(signed, exact, rtol=2e-3, atol=1e-3)


def test_refusals() -> None:
    ok, one = np.ones((4, 64)), np.ones(64)
    rounding = _core.quant.round_with_feedback
    options: dict[str, Any] = {"rule": "fit", "scale": "row"}
    with pytest.raises(ValueError, match="activations must be finite, got inf at token 1, column 2"):
        _core.quant.sum_moments(np.array([[1, 2, 3], [4, 5, np.inf]], np.float32), None, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="sums"):
        _core.quant.sum_moments(np.ones((2, 3), np.float32), None, np.zeros((3, 4)))
    with pytest.raises(TypeError, match="float32"):
        _core.quant.sum_moments(np.ones((2, 3)), None, np.zeros((3, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rule is fit, grid, absmean or twn, got 'best'"):
        rounding(ok, None, one, rule="best", scale="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sizes do not match 4 x 64"):
        rounding(ok, None, np.ones(63), **options)
    with pytest.raises(ValueError, match="importances must be positive"):
        rounding(ok, None, one * 0, **options)
    with pytest.raises(ValueError, match="target must be finite"):
        rounding(ok * np.nan, None, one, **options)
    with pytest.raises(ValueError, match="positive diagonal"):
        rounding(ok, np.zeros((64, 64)), one, **options)
    with pytest.raises(ValueError, match="positive diagonal"):
        _core.quant.add_correction(ok.copy(), ok, np.zeros((64, 64)))
    with pytest.raises(ValueError, match="sizes do not match 4 x 64"):
        _core.quant.add_correction(ok.copy(), np.ones((4, 63)), np.eye(64))
    with pytest.raises(ValueError, match="above 65504"):
        rounding(ok * 1e6, None, one, **options)
    with pytest.raises(ValueError, match="positive diagonal, got 0 in column 0"):
        _core.quant.descend(ok, np.zeros((64, 64)), np.zeros((4, 64), np.int8), np.ones(4, np.float32), scale="row")
    locked = np.zeros((4, 64), np.int8)
    locked.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        _core.quant.descend(ok, np.eye(64), locked, np.ones(4, np.float32), scale="row")


def test_zero_rows_have_scale_zero() -> None:
    trits, scales = _core.quant.round_with_feedback(
        np.zeros((3, 70)), np.eye(70), np.ones(70), rule="fit", scale="group", group_size=64
    )
    assert not trits.any()
    assert not scales.any()
    _core.quant.descend(np.zeros((3, 70)), np.eye(70), trits, scales, scale="group", group_size=64)
    assert not trits.any()
    assert np.isfinite(scales).all()
