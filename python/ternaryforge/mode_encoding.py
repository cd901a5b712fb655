# SPDX-License-Identifier: Apache-2.0
"""What a mode of a bit map makes of a matrix: its codes and scales, the tensors that hold them, their sizes.

| mode | `<module>.weight` | `<module>.weight_scale` | weight |
|---|---|---|---|
| f16 | F16, or BF16 where the source is | none | as stored |
| int8 | I8 [rows, cols] | F16 [rows] | code * scale |
| two_plane | U8 [2, ceil(rows / 4), cols] | F16 in the shape of the options | (3 * first + second) * scale |
| ternary | U8 [ceil(rows / 4), cols], as in every ternary folder | F16 in the shape of the options | trit * scale |
| binary | U8 [rows, ceil(cols / 8)], column c in bit c % 8 of byte c // 8 | the same | bit 1: scale, 0: -scale |

Sizes follow from shapes alone, never from values.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.bit_map import Mode
from ternaryforge.checkpoint_writer import TensorPlan
from ternaryforge.quantization import ScaleKind
from ternaryforge.rounding import RoundingOptions
from ternaryforge.weights import packed_rows, packed_shape, scale_name

Float32 = NDArray[np.float32]

_LARGEST_F16 = 65504.0
_HEADER_UNIT = 8  # what a tensor adds to a header is a multiple of it


@dataclass(frozen=True, slots=True)
class Encoded:
    """A matrix in a mode. `codes` [rows, cols]: floats under f16, else int8; `scales` fit in 16 bits."""

    mode: Mode
    codes: NDArray[np.int8] | Float32
    scales: Float32
    group_size: int  # 0 unless scales are per group

    def values(self) -> Float32:
        """The weights that it stands for."""
        if self.mode == "f16":
            return self.codes.astype(np.float32)
        scales = self.scales
        if scales.ndim == 2:
            scales = scales.repeat(self.group_size, axis=1)[:, : self.codes.shape[1]]
        elif scales.size > 1:
            scales = scales[:, None]
        return (self.codes * scales).astype(np.float32)

    def rows(self, chosen: NDArray[np.int64] | slice) -> "Encoded":
        """Some of the rows, as slots take them of a tensor that holds several."""
        scales = self.scales if self.scales.size == 1 else self.scales[chosen]
        return Encoded(self.mode, self.codes[chosen], scales, self.group_size)

    def stored(self, dtype: str) -> tuple[NDArray[np.uint8], NDArray[np.float16] | None]:
        """The bytes of the weight, whose tensor has `dtype`, and the scales as stored."""
        rows, cols = self.codes.shape
        if self.mode == "f16":
            return _core.formats.quantize(dtype, np.ascontiguousarray(self.codes, np.float32)), None
        codes, scales = np.ascontiguousarray(self.codes, np.int8), self.scales.astype(np.float16)
        if self.mode == "int8":
            return codes.view(np.uint8), scales
        if self.mode == "binary":
            return _core.formats.pack(codes, "onebit_binary"), scales
        padding = np.zeros((4 * packed_rows(rows) - rows, cols), np.int8)
        layout = "two_plane" if self.mode == "two_plane" else "hf_packed"
        return _core.formats.pack(np.concatenate([codes, padding]), layout), scales

    def packed(self) -> _core.formats.PackedTensor:
        """What the engine runs."""
        rows, cols = self.codes.shape
        if self.mode == "f16":
            return _core.formats.PackedTensor("f32", rows, cols, np.ascontiguousarray(self.codes).view(np.uint8))
        codes = np.ascontiguousarray(self.codes, np.int8)
        kind: ScaleKind = "group" if self.scales.ndim == 2 else "row" if self.scales.size == rows else "tensor"
        layout = {"int8": "int8", "two_plane": "t8"}.get(self.mode, "t16")
        return _core.formats.PackedTensor(
            layout,
            rows,
            cols,
            codes if layout == "int8" else _core.formats.pack(codes, layout),
            scale_kind="row" if self.mode == "int8" else kind,
            group_size=self.group_size,
            scales=self.scales.reshape(-1),
        )


def encode(weights: Float32, mode: Mode, options: RoundingOptions, *, dtype: str, where: str) -> Encoded:
    """Rounds a matrix [rows, cols] into a mode. `dtype` is the one of the source.

    f16 and int8 look at rows alone, so that a large table can be encoded in parts. Raises
    FormatError that begins with `where` for values that the mode cannot hold.
    """
    if not np.isfinite(weights).all():
        raise FormatError(f"{where} holds NaN or infinity; the checkpoint is damaged")
    group = options.group_size if options.scale == "group" else 0
    match mode:
        case "f16":
            return Encoded(mode, weights if dtype == "BF16" else _halves(weights, where), np.ones(1, np.float32), 0)
        case "int8":
            scales = _halves(np.abs(weights).max(1) / np.float32(127), where)
            steps = np.where(scales > 0, scales, np.float32(1))[:, None]
            return Encoded(mode, np.clip(np.rint(weights / steps), -127, 127).astype(np.int8), scales, 0)
        case "two_plane":
            return _in_two_planes(weights, options, where)
        case "ternary":
            try:
                trits, scales = _core.quant.quantize_weights(
                    np.ascontiguousarray(weights),
                    scheme=options.scheme,
                    scale=options.scale,
                    group_size=group or 64,
                    threads=options.threads,
                )
            except ValueError as error:
                raise FormatError(f"{where}: {error}") from None
            return Encoded(mode, trits, scales, group)
        case "binary":
            signs = np.where(weights < 0, np.int8(-1), np.int8(1))
            return Encoded(mode, signs, _halves(_mean_magnitudes(weights, options), where), group)


def plan_matrix(
    name: str, mode: Mode, shape: tuple[int, int], options: RoundingOptions, *, dtype: str
) -> list[TensorPlan]:
    """The tensors that hold a matrix in a mode. `dtype` is the one of the source."""
    rows, cols = shape
    match mode:
        case "f16":
            return [TensorPlan(name, stored_dtype(mode, dtype), shape)]
        case "int8":
            return [TensorPlan(name, "I8", shape), TensorPlan(scale_name(name), "F16", (rows,))]
    stored = (rows, -(-cols // 8)) if mode == "binary" else packed_shape(rows, cols, 2 if mode == "two_plane" else 1)
    return [
        TensorPlan(name, "U8", stored),
        TensorPlan(scale_name(name), "F16", options.scale_shape(rows, cols)),
    ]


def stored_dtype(mode: Mode, dtype: str) -> str:
    """The dtype of the weight's tensor; `dtype` is the one of the source."""
    return {"f16": "BF16" if dtype == "BF16" else "F16", "int8": "I8"}.get(mode, "U8")


def tensor_bytes(tensors: Iterable[TensorPlan], digits: int) -> int:
    """What tensors add to a safetensors file whose header has room for `digits` digits in every offset."""
    total = 0
    for tensor in tensors:
        entry = {tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": []}}
        length = len(json.dumps(entry, separators=(",", ":"))) + 2 * digits  # two commas instead of two braces
        total += tensor.nbytes + length + -length % _HEADER_UNIT
    return total


def empty_file_bytes() -> int:
    """A safetensors file without tensors: the length of the header, and the metadata that `CheckpointWriter` writes."""
    length = len('{"__metadata__":{"format":"pt"}}')
    return 8 + length + -length % _HEADER_UNIT


def _halves(values: Float32, where: str) -> Float32:
    """Rounded to 16 bits."""
    if values.size and float(np.abs(values).max()) > _LARGEST_F16:
        raise FormatError(
            f"{where} holds {float(np.abs(values).max()):.6g}, more than 16 bits can ({_LARGEST_F16:.0f}); "
            "convert without a bit map"
        )
    return values.astype(np.float16).astype(np.float32)


def _in_two_planes(weights: Float32, options: RoundingOptions, where: str) -> Encoded:
    """Levels -4 .. 4 by least squares, whatever the scheme for trits is."""
    target = weights.astype(np.float64)
    if options.scale == "tensor":
        target = target.reshape(1, -1)
    group = options.group_size if options.scale == "group" else 0
    try:
        levels, scales = _core.quant.round_with_feedback(
            target,
            None,
            np.ones(target.shape[1]),
            rule="fit",
            scale="group" if group else "row",
            group_size=group or 64,
            planes=2,
            threads=options.threads,
        )
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from None
    return Encoded("two_plane", levels.reshape(weights.shape), scales, group)


def _mean_magnitudes(weights: Float32, options: RoundingOptions) -> Float32:
    """The scales of least squares for signs."""
    magnitudes = np.abs(weights)
    if options.scale == "tensor":
        return np.array([magnitudes.mean(dtype=np.float64)], np.float32)
    cols = weights.shape[1]
    size = options.group_size if options.scale == "group" else cols
    begins = np.arange(0, cols, size)
    sums: NDArray[np.float64] = np.add.reduceat(magnitudes.astype(np.float64), begins, axis=1)
    means: Float32 = (sums / np.minimum(size, cols - begins)).astype(np.float32)
    return means if options.scale == "group" else means[:, 0]
