# SPDX-License-Identifier: Apache-2.0
"""Calibrating one linear layer: speed of its parts against NumPy doing the same, time and memory of all of it.

    python benchmarks/bench_calibration.py --dim 2048 --tokens 8192 --threads 2

Every answer is checked first. NumPy's x.T @ x is its BLAS's dsyrk. The whole layer is rounded with and without
what its output lacks (propagation); its memory is the highest growth of RssAnon beyond its inputs, in units of
d^2 doubles. Prints a table and ends with one JSON line; exit code 1 where a limit is missed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.calibration_linear import LinearOptions, moment_factor, quantize_linear
from ternaryforge.memory import PeakAnonymous

Float64 = NDArray[np.float64]
GROUP = 128
LEAST_SPEED = {"second moments": 0.8, "columns and scales": 5.0}  # of NumPy's
MOST_SECONDS, MOST_SQUARES = 20.0, 3.0  # of a whole layer


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


def make_layer(dim: int, tokens: int, threads: int) -> tuple[NDArray[np.float32], NDArray[np.float32], Float64]:
    """Weights [dim, dim], correlated activations [tokens, dim], and their second moments."""
    random = np.random.default_rng(0)
    x = random.normal(size=(tokens, dim)).astype(np.float32)
    x[:, 1:] += x[:, :-1] / 2
    moments = np.zeros((dim, dim))
    _core.quant.sum_moments(x, None, moments, threads=threads)
    moments /= tokens
    weights = random.standard_t(4, size=(dim, dim)).astype(np.float32) / np.float32(dim**0.5)
    return weights, x, moments


def measure_layer(dim: int, tokens: int, threads: int, propagation: bool) -> dict[str, float]:
    """Seconds and anonymous memory, beyond the inputs, of a whole layer by method best."""
    weights, _, moments = make_layer(dim, tokens, threads)
    lacking = 0.01 * weights @ moments if propagation else None
    options = LinearOptions("best", "group", GROUP, 0.01, 4, threads)
    with PeakAnonymous() as memory:
        start = time.perf_counter()
        quantize_linear(weights, moments, lacking, options)
        seconds = time.perf_counter() - start
    if memory.growth is None:
        raise SystemExit("this system does not tell the memory of a process")
    return {"seconds": seconds, "peak_bytes": memory.growth, "squares": memory.growth / (8 * dim**2)}


def compare(dim: int, tokens: int, threads: int, passes: int) -> dict[str, dict[str, float]]:
    """Moments and columns against NumPy; the answers are checked first."""
    weights, x, moments = make_layer(dim, tokens, threads)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(moments, wide.T @ wide / tokens, rtol=1e-9, atol=1e-9)
    moments += 0.01 * np.eye(dim)
    target, importance = weights.astype(np.float64), np.diag(moments).copy()
    factor = moment_factor(moments)
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
    results: dict[str, dict[str, float]] = {}
    for name, ours, theirs in (
        (
            "second moments",
            lambda: _core.quant.sum_moments(x, None, np.zeros((dim, dim)), threads=threads),
            lambda: (double := x.astype(np.float64)).T @ double,
        ),
        ("columns and scales", columns, lambda: numpy_columns(target, upper, importance)),
    ):
        mine, others = timed(ours, passes), timed(theirs, passes)
        results[name] = {"seconds": mine[0], "spread": mine[1], "numpy_seconds": others[0], "numpy_spread": others[1]}
        print(f"{name}: {mine[0]:.3f} s, NumPy {others[0]:.3f} s, {others[0] / mine[0]:.2f} times as fast")
    return results


def main() -> int:
    """Prints all; whether the limits were kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3)
    arguments = parser.parse_args()
    dim, tokens, threads = arguments.dim, arguments.tokens, arguments.threads
    whole: dict[str, dict[str, float]] = {}
    for propagation in (False, True):
        name = "with propagation" if propagation else "without propagation"
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:  # no memory that was used before
            found = whole[name] = fresh.submit(measure_layer, dim, tokens, threads, propagation).result()
        print(f"one {dim} x {dim} layer, best, {name}: {found['seconds']:.2f} s, {found['squares']:.2f} d^2 doubles")
    results = compare(dim, tokens, threads, arguments.passes)
    document = {"benchmark": "calibration", "dim": dim, "tokens": tokens, "threads": threads, "group_size": GROUP}
    document |= {"target": _core.simd.active_target(), "numpy": np.__version__, "results": results, "best": whole}
    print(json.dumps(document))
    fast = all(found["numpy_seconds"] / found["seconds"] >= LEAST_SPEED[name] for name, found in results.items())
    small = all(found["seconds"] <= MOST_SECONDS and found["squares"] <= MOST_SQUARES for found in whole.values())
    return 0 if fast and small else 1


if __name__ == "__main__":
    sys.exit(main())
