# SPDX-License-Identifier: Apache-2.0
"""One linear layer: from weights and moments of its input to trits, or two planes of them, and scales.

With H the second moments of the input that the layer really sees, and D the moments of what its
output lacks with that input, the weights that fit best are W + D H^-1. They are rounded by the
calibrator of the core; docs/guide/quantization.md has the formulas.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge.quantization import ScaleKind

Method = Literal["grid", "fit", "gptq", "best"]
Planes = Literal[1, 2]
METHODS: tuple[Method, ...] = ("grid", "fit", "gptq", "best")
Float32: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]

DAMPING = 0.01
"""The share of the mean second moment that is added to all of them."""
DESCENT_ROUNDS = 4

_ROWS_AT_ONCE = 512  # so that Ctrl-C is heard between two calls
_TENSOR_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class LinearOptions:
    """How one layer is quantised; see `calibrate`."""

    method: Method
    scale: ScaleKind
    group_size: int
    damping: float
    rounds: int
    threads: int
    planes: Planes = 1

    def run_cols(self, cols: int) -> int:
        """Columns of a row that share a scale."""
        return self.group_size if self.scale == "group" else cols


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """`scales` as `quantize_weights` gives them; errors are relative to the output of the best weights.

    Of two planes, `trits` are the levels -4 .. 4 = 3 * first trit + second trit.
    """

    trits: NDArray[np.int8]
    scales: Float32
    error_before: float
    error_after: float
    dead_channels: int


def quantize_linear(
    weights: Float32, moments: Float64, lacking: Float64 | None, options: LinearOptions
) -> QuantizedLinear:
    """Quantises `weights` [rows, cols] for inputs of second moments `moments` [cols, cols].

    `lacking` [rows, cols] holds E[(wanted - W x) x^T], None for nothing. `moments` are changed in place
    meanwhile, and as before at the end. Beside what is given this takes the memory of little more than
    two arrays of their size. Raises ValueError for an input that is zero for the whole text.
    """
    feedback = options.method in ("gptq", "best")
    with damped(moments, options.damping):
        factor = moment_factor(moments) if feedback or lacking is not None else None
        target = fit_target(weights, factor, lacking, options.threads)
        factor = factor if feedback else None
        importance = np.diag(moments).copy()
        if options.scale == "tensor":
            trits, scales = _quantize_tensor(target, moments, factor, importance, options)
        else:
            trits, scales = _round(target, factor, importance, options)
            del factor  # as large as the moments
            if options.method == "best":
                _descend(target, moments, trits, scales, options)
    energy = energy_of(target, moments) or 1.0
    return QuantizedLinear(
        trits=trits,
        scales=scales,
        error_before=_error(target, *round_plainly(weights, options), moments, options) / energy,
        error_after=_error(target, trits, scales, moments, options) / energy,
        dead_channels=int(np.count_nonzero(np.diag(moments) == 0)),
    )


def round_plainly(weights: Float32, options: LinearOptions) -> tuple[NDArray[np.int8], Float32]:
    """Least squares without a look at the input: what calibration is measured against."""
    if options.planes == 2:
        even = np.ones(weights.shape[1])
        return _round(weights.astype(np.float64), None, even, replace(options, method="fit"))
    return _core.quant.quantize_weights(
        weights, scheme="ls", scale=options.scale, group_size=options.group_size, threads=options.threads
    )


@contextmanager
def damped(moments: Float64, share: float) -> Iterator[None]:
    """Second moments with a share of the mean second moment added to all of them, in place, within the block.

    Raises ValueError where all are zero.
    """
    diagonal = np.diag(moments).copy()
    mean = float(diagonal.mean())
    if mean <= 0:
        raise ValueError("[calibrate] the input must not be zero for the whole calibration text, got only zeros")
    np.fill_diagonal(moments, diagonal + share * mean)
    try:
        yield
    finally:
        np.fill_diagonal(moments, diagonal)


def moment_factor(moments: Float64) -> Float64:
    """R, upper triangular, with R R^T = moments."""
    return np.ascontiguousarray(np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1])


def fit_target(weights: Float32, factor: Float64 | None, lacking: Float64 | None, threads: int) -> Float64:
    """The weights that fit best; see `quantize_linear`. `factor`: that of the moments, needed with `lacking`."""
    target = weights.astype(np.float64)
    if lacking is not None and factor is not None:
        _core.quant.add_correction(target, np.ascontiguousarray(lacking), factor, threads=threads)
    return target


def energy_of(weights: Float64, moments: Float64) -> float:
    """tr(W H W^T)."""
    return sum(float(((weights[part] @ moments) * weights[part]).sum()) for part in _parts(len(weights)))


def _parts(rows: int) -> Iterator[slice]:
    for begin in range(0, rows, _ROWS_AT_ONCE):
        yield slice(begin, begin + _ROWS_AT_ONCE)


def _round(
    target: Float64, factor: Float64 | None, importance: Float64, options: LinearOptions, tensor_scale: float = 1.0
) -> tuple[NDArray[np.int8], Float32]:
    parts = [
        _core.quant.round_with_feedback(
            target[part],
            factor,
            importance,
            rule="grid" if options.method == "grid" else "fit",
            scale=options.scale,
            group_size=options.group_size,
            tensor_scale=tensor_scale,
            planes=options.planes,
            threads=options.threads,
        )
        for part in _parts(len(target))
    ]
    trits = np.concatenate([part[0] for part in parts])
    return trits, parts[0][1] if options.scale == "tensor" else np.concatenate([part[1] for part in parts])


def _descend(
    target: Float64, moments: Float64, trits: NDArray[np.int8], scales: Float32, options: LinearOptions
) -> None:
    for part in _parts(len(target)):
        _core.quant.descend(
            target[part],
            moments,
            trits[part],
            scales if options.scale == "tensor" else scales[part],
            scale=options.scale,
            group_size=options.group_size,
            rounds=options.rounds,
            planes=options.planes,
            threads=options.threads,
        )


def _quantize_tensor(
    target: Float64, moments: Float64, factor: Float64 | None, importance: Float64, options: LinearOptions
) -> tuple[NDArray[np.int8], Float32]:
    """One scale for all: from the rule without feedback; then trits for the scale and a scale for the trits in turn."""
    flat, repeated = target.reshape(1, -1), np.tile(importance, len(target))
    rule: Literal["grid", "fit"] = "grid" if options.method == "grid" else "fit"
    first = float(_core.quant.round_with_feedback(flat, None, repeated, rule=rule, scale="row")[1][0])
    scales = storable_scale(first)
    trits, _ = _round(target, factor, importance, options, float(scales[0]))
    for _ in range(_TENSOR_ROUNDS if factor is not None else 0):
        images = trits @ moments
        curvature = float((images * trits).sum())
        if curvature <= 0:
            break
        scales = storable_scale(abs(float((images * target).sum())) / curvature)
        trits, _ = _round(target, factor, importance, options, float(scales[0]))
        if options.method == "best":
            _descend(target, moments, trits, scales, options)
    return trits, scales


def storable_scale(scale: float) -> Float32:
    """The nearest scale that a stock checkpoint, which stores 1 / scale, gives back exactly."""
    one = np.array([[scale]], np.float32)
    return _core.quant.quantize_weights(one, scheme="absmax", scale="tensor")[1]


def _error(
    target: Float64, trits: NDArray[np.int8], scales: Float32, moments: Float64, options: LinearOptions
) -> float:
    rows, cols = trits.shape
    wide = scales.astype(np.float64).reshape(1 if options.scale == "tensor" else rows, -1)
    error = 0.0
    for part in _parts(rows):
        own = wide if options.scale == "tensor" else wide[part]
        rest = target[part] - trits[part] * np.repeat(own, options.run_cols(cols), axis=1)[:, :cols]
        error += float(((rest @ moments) * rest).sum())
    return error
