# SPDX-License-Identifier: Apache-2.0
"""Ternary matrices in NumPy: quantise, pack, unpack, multiply.

A matrix has one row per output feature. Trits are int8 values -1, 0, 1.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core

Scheme = Literal["ls", "absmean", "absmax", "twn"]
ScaleKind = Literal["tensor", "row", "group"]

__all__ = ["matmul", "pack", "quantize_weights", "unpack"]


def quantize_weights(
    weights: NDArray[np.float32],
    *,
    scheme: Scheme = "ls",
    scale: ScaleKind = "tensor",
    group_size: int = 128,
    threads: int | None = None,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Float32 weights [rows, cols] as trits and scales: weight ~ trit * scale.

    Scales have shape [1], [rows] or [rows, groups]. Raises TypeError for another dtype or rank,
    ValueError for NaN, infinity and unknown options.
    """
    _require(weights, np.float32, 2, "quantize_weights")
    return _core.quant.quantize_weights(
        np.ascontiguousarray(weights),
        scheme=scheme,
        scale=scale,
        group_size=group_size,
        threads=threads or _core.parallel.default_threads(),
    )


def pack(codes: NDArray[np.int8], layout: str) -> NDArray[np.uint8]:
    """The bytes of a matrix of trits [rows, cols] in a layout ("hf_packed", "t16").

    Raises ValueError for a value that is no trit and for a shape that the layout cannot hold.
    """
    _require(codes, np.int8, 2, "pack")
    return _core.formats.pack(np.ascontiguousarray(codes), layout)


def unpack(data: NDArray[np.uint8], layout: str, shape: tuple[int, int]) -> NDArray[np.int8]:
    """The trits [rows, cols] that `pack` was given. Raises FormatError for bytes that hold others."""
    _require(data, np.uint8, None, "unpack")
    rows, cols = shape
    return _core.formats.unpack(np.ascontiguousarray(data).reshape(-1), layout, rows, cols)


def matmul(
    x: NDArray[np.float32],
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    *,
    group_size: int = 128,
    activations: Literal["int8", "int16", "float"] = "int8",
    threads: int | None = None,
) -> NDArray[np.float32]:
    """Input x [m, cols] times the transposed matrix trit * scale [rows, cols]: [m, rows].

    `scales` has shape [1], [rows] or [rows, groups], as `quantize_weights` returns them. With
    "int8" and "int16" activations each row of x is rounded to 127 or 32639 steps on either side of
    zero first, and integer sums are exact.
    """
    _require(x, np.float32, 2, "matmul")
    _require(codes, np.int8, 2, "matmul")
    _require(scales, np.float32, None, "matmul")
    rows, cols = codes.shape
    groups = -(-cols // group_size) if group_size > 0 else 0
    kinds: dict[tuple[int, ...], ScaleKind] = {(1,): "tensor", (rows, groups): "group"}
    kind = kinds.get(scales.shape, "row" if scales.shape == (rows,) else None)
    if kind is None:
        raise ValueError(f"[matmul] scales must have shape (1,), ({rows},) or ({rows}, {groups}), got {scales.shape}")
    tensor = _core.formats.PackedTensor(
        "t16",
        rows,
        cols,
        pack(codes, "t16"),
        scale_kind=kind,
        group_size=group_size if kind == "group" else 0,
        scales=np.ascontiguousarray(scales).reshape(-1),
    )
    return _core.kernels.linear(
        np.ascontiguousarray(x),
        tensor,
        activations=activations,
        threads=threads or _core.parallel.default_threads(),
    )


def _require(array: NDArray[Any], dtype: type[np.generic], rank: int | None, name: str) -> None:
    got = getattr(array, "dtype", type(array).__name__)
    if got != dtype:
        raise TypeError(f"[{name}] expected an array of {np.dtype(dtype)}, got {got}")
    if rank is not None and array.ndim != rank:
        raise TypeError(f"[{name}] expected {rank} dimensions, got {array.ndim}")
