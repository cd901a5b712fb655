# SPDX-License-Identifier: Apache-2.0
"""Speed of calibrating one linear layer against NumPy doing the same: moments, columns with scales, all of it.

    python benchmarks/bench_calibration.py --dim 2048 --tokens 8192 --threads 2

Every answer is checked first. NumPy's x.T @ x is its BLAS's dsyrk. Prints a table and ends with one JSON line.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.calibration_linear import LinearOptions, quantize_linear

Float64 = NDArray[np.float64]
GROUP = 128


def exact_scales(weights: Float64, importance: Float64) -> Float64:
    """The least-squares scale of every row: one sort, two running sums."""
    sizes = np.abs(weights)
    order = np.argsort(-sizes, axis=1)
    mass = np.cumsum(importance[order], axis=1)
    sums = np.cumsum(np.take_along_axis(importance * sizes, order, 1), axis=1)
    best = np.argmax(sums**2 / mass, axis=1)[:, None]
    found: Float64 = np.take_along_axis(sums / mass, best, 1)[:, 0]
    return found.astype(np.float16).astype(np.float64)


def numpy_columns(target: Float64, upper: Float64, importance: Float64) -> tuple[NDArray[np.int8], Float64]:
    """GPTQ as its authors block it: rank-one updates within a group, one product for all columns behind it."""
    weights, (rows, cols) = target.copy(), target.shape
    trits, scales = np.empty((rows, cols), np.int8), np.empty((rows, cols // GROUP))
    for begin in range(0, cols, GROUP):
        end = begin + GROUP
        block = np.asfortranarray(weights[:, begin:end])
        scale = scales[:, begin // GROUP] = exact_scales(block, importance[begin:end])
        errors = np.empty_like(block, order="F")
        for k in range(GROUP):
            column = block[:, k]
            code = (column > scale / 2).astype(np.int8) - (column < -scale / 2).astype(np.int8)
            trits[:, begin + k] = code
            errors[:, k] = (column - scale * code) / upper[begin + k, begin + k]
            block[:, k + 1 :] -= np.outer(errors[:, k], upper[begin + k, begin + k + 1 : end])
        weights[:, end:] -= errors @ upper[begin:end, end:]
    return trits, scales


def timed(run: Callable[[], Any], passes: int) -> tuple[float, float]:
    """Median and spread of the seconds of a call."""
    seconds = []
    for _ in range(passes):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), max(seconds) - min(seconds)


def main() -> None:
    """Checks, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3)
    arguments = parser.parse_args()
    dim, threads = arguments.dim, arguments.threads
    random = np.random.default_rng(0)
    x = random.normal(size=(arguments.tokens, dim)).astype(np.float32)
    x[:, 1:] += x[:, :-1] / 2
    wide = x.astype(np.float64)
    sums = np.zeros((dim, dim))
    _core.quant.sum_moments(x, None, sums, threads=threads)
    np.testing.assert_allclose(sums, wide.T @ wide, rtol=1e-9, atol=1e-6)
    moments = sums / arguments.tokens + 0.01 * np.eye(dim)
    weights = random.standard_t(4, size=(dim, dim)).astype(np.float32) / np.float32(dim**0.5)
    target, importance = weights.astype(np.float64), np.diag(moments).copy()
    factor = np.ascontiguousarray(np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1])
    upper = np.linalg.cholesky(np.linalg.inv(moments)).T.copy()

    def columns() -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        return _core.quant.round_with_feedback(
            target, factor, importance, rule="fit", scale="group", group_size=GROUP, threads=threads
        )

    trits, scales = columns()
    expected = numpy_columns(target, upper, importance)
    agreement = float((trits == expected[0]).mean())
    if agreement < 0.999:  # a rounding error may turn a tie, and what follows it
        raise SystemExit(f"only {agreement:.4f} of the trits agree with NumPy's")
    np.testing.assert_allclose(np.median(scales), np.median(expected[1]), rtol=1e-3)
    options = LinearOptions("best", "group", GROUP, 0.01, 4, threads)
    results = {}
    for name, ours, theirs in (
        (
            "second moments",
            lambda: _core.quant.sum_moments(x, None, np.zeros((dim, dim)), threads=threads),
            lambda: (double := x.astype(np.float64)).T @ double,
        ),
        ("columns and scales", columns, lambda: numpy_columns(target, upper, importance)),
    ):
        mine, others = timed(ours, arguments.passes), timed(theirs, arguments.passes)
        results[name] = {"seconds": mine[0], "spread": mine[1], "numpy_seconds": others[0], "numpy_spread": others[1]}
        print(f"{name}: {mine[0]:.3f} s, NumPy {others[0]:.3f} s, {others[0] / mine[0]:.2f} times as fast")
    whole = timed(lambda: quantize_linear(weights, moments, None, options), 1)[0]
    print(f"one {dim} x {dim} layer by method best: {whole:.2f} s")
    document = {"dim": dim, "tokens": arguments.tokens, "threads": threads, "target": _core.simd.active_target()}
    print(json.dumps(document | {"agreement": agreement, "best_seconds": whole, "results": results}))


if __name__ == "__main__":
    main()
